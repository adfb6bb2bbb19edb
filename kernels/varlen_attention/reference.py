"""Attention over packed sequences in plain torch: one SDPA call for each run of equal lengths."""

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F


def varlen_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """softmax(q kᵀ / √D) v within each sequence, every token seeing all tokens of its own sequence.

    q, k, v: (T, H, D). cu_seqlens: (S + 1,), sequence s being tokens cu_seqlens[s] to cu_seqlens[s + 1].
    Neighbours of one length share an SDPA call: a batch sorted by ratio costs one call a ratio, not one
    an image. Where tensors have no values (the meta device), sequences are taken to be of one length.
    """
    if cu_seqlens.device.type == "meta":
        return _batched_sdpa(q, k, v, cu_seqlens.shape[0] - 1)
    outputs = [
        _batched_sdpa(q[tokens], k[tokens], v[tokens], count)
        for tokens, count in _runs_of_equal_length(cu_seqlens.tolist())
    ]
    return torch.cat(outputs) if outputs else q + k + v  # empty, and differentiable


def _runs_of_equal_length(cu_seqlens: list[int]) -> Iterator[tuple[slice, int]]:
    """The tokens of each run of neighbouring sequences of one length, and how many sequences those are."""
    start = cu_seqlens[0]
    for length, run in groupby(end - begin for begin, end in pairwise(cu_seqlens)):
        count = sum(1 for _ in run)
        if length > 0:
            yield slice(start, start + count * length), count
        start += count * length


def _batched_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
    q_BHLD, k_BHLD, v_BHLD = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD).transpose(1, 2).flatten(0, 1)
