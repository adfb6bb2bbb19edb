"""Attention over packed sequences in plain torch: one SDPA call per run of equal lengths."""

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch

from ..sdpa import scaled_dot_product_attention


def varlen_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute softmax(q kᵀ / √D) v within each sequence, with every query attending to all its keys.

    q: (T, H, D). k, v: (U, H, D). cu_seqlens: (S + 1,); sequence s has the queries cu_seqlens[s] to
    cu_seqlens[s + 1]. cu_seqlens_k: the same for the keys, by default those of the queries. Queries without
    keys get zeros. Adjacent sequences of equal lengths share an SDPA call, so a batch sorted by ratio costs
    one call per ratio instead of one per image. On the meta device, all sequences are assumed equally long.
    """
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if cu_seqlens.device.type == "meta":
        return _batched_sdpa(q, k, v, cu_seqlens.shape[0] - 1)
    runs = _runs_of_equal_lengths(cu_seqlens.tolist(), cu_seqlens_k.tolist())
    outputs = [_batched_sdpa(q[queries], k[keys], v[keys], count) for queries, keys, count in runs]
    return torch.cat(outputs) if outputs else zero_output(q, k, v)


def zero_output(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the output of queries without keys: zeros like q, differentiable in all inputs."""
    return q * 0 + (k.sum() + v.sum()) * 0


def _runs_of_equal_lengths(
    cu_seqlens: list[int], cu_seqlens_k: list[int]
) -> Iterator[tuple[slice, slice, int]]:
    """Yield the queries, the keys and the number of sequences of each run of equally long sequences."""
    query, key = cu_seqlens[0], cu_seqlens_k[0]
    lengths = [[end - begin for begin, end in pairwise(bounds)] for bounds in (cu_seqlens, cu_seqlens_k)]
    for (queries, keys), run in groupby(zip(*lengths, strict=True)):
        count = sum(1 for _ in run)
        next_query, next_key = query + count * queries, key + count * keys
        if queries > 0:
            yield slice(query, next_query), slice(key, next_key), count
        query, key = next_query, next_key


def _batched_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
    if k.shape[0] == 0:
        return zero_output(q, k, v)
    q_BHLD, k_BHLD, v_BHLD = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD).transpose(1, 2).flatten(0, 1)
