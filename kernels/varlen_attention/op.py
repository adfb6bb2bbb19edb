"""Attention over packed sequences: `varlen_attention` runs it with the best backend there is."""

import torch

from .. import backends
from .reference import varlen_attention_reference


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """Non-causal attention of every token to the tokens of its own sequence.

    q, k, v: (T, H, D) of one dtype. cu_seqlens: int32 (S + 1,), rising from 0 to T. max_seqlen: the
    longest sequence, in tokens. Returns (T, H, D).
    """
    backends.choose("varlen_attention", q)  # the reference is all there is; forcing another raises here
    return varlen_attention_reference(q, k, v, cu_seqlens)
