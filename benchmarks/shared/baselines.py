"""Baselines used only by benchmarks; the other baselines are the references of the operators."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def sdpa_per_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """Compute attention over packed sequences in a loop: one SDPA call per sequence. q, k, v: (T, H, D)."""
    outputs = []
    for sequence in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        q_HLD, k_HLD, v_HLD = (x.transpose(0, 1) for x in sequence)
        outputs.append(F.scaled_dot_product_attention(q_HLD, k_HLD, v_HLD).transpose(0, 1))
    return torch.cat(outputs)


def padded_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Compute attention over padded sequences: one SDPA call that masks the padding.

    q, k, v: (S, L, H, D). real: (S, L), False at padding. Returns (S, L, H, D), undefined at padding.
    """
    q_SHLD, k_SHLD, v_SHLD = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q_SHLD, k_SHLD, v_SHLD, attn_mask=real[:, None, None, :]).transpose(
        1, 2
    )


def materialized_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute attention with all N x N weights in memory. q, k, v: (B, N, H, D)."""
    q_BHND, k_BHND, v_BHND = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q_BHND @ k_BHND.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v_BHND).transpose(1, 2)


def block_mask_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Compute attention over packed sequences as one sequence: one SDPA call with a dense mask.

    q, k, v: (T, H, D). mask: (T, T), True where a token attends to another. Returns (T, H, D).
    """
    q_HTD, k_HTD, v_HTD = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q_HTD, k_HTD, v_HTD, attn_mask=mask)[0].transpose(0, 1)
