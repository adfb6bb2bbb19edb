"""Baselines that the package has no use of its own for; the others are its references."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def sdpa_per_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """Attention over packed sequences as a plain loop: one SDPA call a sequence. q, k, v: (T, H, D)."""
    outputs = []
    for sequence in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        q_HLD, k_HLD, v_HLD = (x.transpose(0, 1) for x in sequence)
        outputs.append(F.scaled_dot_product_attention(q_HLD, k_HLD, v_HLD).transpose(0, 1))
    return torch.cat(outputs)


def padded_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Attention over padded sequences: one SDPA call that masks the padding.

    q, k, v: (S, L, H, D). real: (S, L), False at padding. Returns (S, L, H, D), without meaning at padding.
    """
    q_SHLD, k_SHLD, v_SHLD = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q_SHLD, k_SHLD, v_SHLD, attn_mask=real[:, None, None, :]).transpose(
        1, 2
    )


def materialized_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention that keeps all N x N weights: two products and a softmax. q, k, v: (B, N, H, D)."""
    q_BHND, k_BHND, v_BHND = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q_BHND @ k_BHND.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v_BHND).transpose(1, 2)


def block_mask_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention over packed sequences as one sequence: one SDPA call under a dense mask.

    q, k, v: (T, H, D). mask: (T, T), True where a token sees another. Returns (T, H, D).
    """
    q_HTD, k_HTD, v_HTD = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q_HTD, k_HTD, v_HTD, attn_mask=mask)[0].transpose(0, 1)
