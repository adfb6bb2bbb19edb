"""varlen_attention on views of a fused qkv tensor, as in the DiT."""

from collections.abc import Callable

import torch

from benchmarks.static.budgets import ATTENTION_BACKWARD, ATTENTION_EXACT, ATTENTION_FORWARD, Case
from cat_fast.kernels.varlen_attention.triton import (
    varlen_attention_backward_triton,
    varlen_attention_triton,
)

TOKENS, HEADS, SEQUENCES = 3520, 16, 16
EXACT = torch.float32


def launches(dim: int, dtype: torch.dtype) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return functions that launch the forward and the backward pass, with meta tensors."""
    qkv = torch.empty(TOKENS, 3, HEADS, dim, dtype=dtype, device="meta")
    q, k, v = qkv.unbind(1)
    cu_seqlens = torch.empty(SEQUENCES + 1, dtype=torch.int32, device="meta")
    lengths = cu_seqlens, 1024, cu_seqlens, 1024
    out = torch.empty(TOKENS, HEADS, dim, dtype=dtype, device="meta")
    lse = torch.empty(HEADS, TOKENS, device="meta")
    return (
        lambda: varlen_attention_triton(q, k, v, *lengths),
        lambda: varlen_attention_backward_triton(out, q, k, v, out, lse, *lengths),
    )


def _cases() -> dict[str, Case]:
    cases = {}
    for dtype, dims in (
        (torch.bfloat16, (40, 64, 72, 96, 128)),
        (torch.float16, (72,)),
        (EXACT, (64, 72, 128)),
    ):
        exact = dtype == EXACT
        for dim in dims:
            forward, backward = launches(dim, dtype)
            key = f"varlen_attention.{str(dtype).removeprefix('torch.')}.{dim}"
            budget = ATTENTION_EXACT if exact else ATTENTION_FORWARD
            cases[f"{key}.forward"] = Case(launch=forward, budgets={"_forward": budget})
            budget = ATTENTION_EXACT if exact else ATTENTION_BACKWARD
            cases[f"{key}.backward"] = Case(
                launch=backward, budgets={"_backward_queries": budget, "_backward_keys": budget}
            )
    return cases


CASES = _cases()
