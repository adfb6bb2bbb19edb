"""wide_attention: N x H x D of a mid block with one head, and a size that is not a multiple of a tile."""

from functools import partial

import torch

from benchmarks.static.budgets import ATTENTION_BACKWARD, ATTENTION_EXACT, ATTENTION_FORWARD, Case
from cat_fast.kernels.wide_attention.triton import wide_attention_backward_triton, wide_attention_triton


def _forward(dtype: torch.dtype, count: int, heads: int, dim: int) -> None:
    q, k, v = torch.empty(3, 2, count, heads, dim, dtype=dtype, device="meta").unbind()
    wide_attention_triton(q, k, v)


def _backward(dtype: torch.dtype, count: int, heads: int, dim: int) -> None:
    grad_y, q, k, v, y = torch.empty(5, 2, count, heads, dim, dtype=dtype, device="meta").unbind()
    lse = torch.empty(2, heads, count, device="meta")
    wide_attention_backward_triton(grad_y, q, k, v, y, lse)


CASES = {
    f"wide_attention.{name}.{count}x{heads}x{dim}.{str(dtype).removeprefix('torch.')}": Case(
        launch=partial(launch, dtype, count, heads, dim),
        budgets=dict.fromkeys(kernels, ATTENTION_EXACT if dtype == torch.float32 else budget),
    )
    for name, launch, kernels, budget in (
        ("forward", _forward, ("_forward",), ATTENTION_FORWARD),
        ("backward", _backward, ("_backward_dkdv", "_backward_dq"), ATTENTION_BACKWARD),
    )
    for dtype, count, heads, dim in (
        (torch.bfloat16, 1024, 1, 512),
        (torch.float16, 1024, 1, 512),
        (torch.float32, 1024, 1, 512),
        (torch.bfloat16, 1024, 1, 256),
        (torch.bfloat16, 1000, 2, 384),
    )
}
