"""Attention with heads of one dimension: aligned heads, full and partial tiles, and odd numbers."""

from functools import partial

import torch

from benchmarks.static.budgets import ARITHMETIC, MEMORY, SMALL, Budget, Case
from cat_fast.kernels.scalar_attention import triton as scalar_attention

UNALIGNED = Budget(kind="memory-bound, heads not aligned", occupancy=0.5)


def launch(heads: int, dtype: torch.dtype) -> None:
    """Run forward and backward."""
    q, k, v, grad_y = (torch.empty(2, 1024, heads, dtype=dtype, device="meta") for _ in range(4))
    scalar_attention.scalar_attention_triton(q, k, v)
    scalar_attention.scalar_attention_backward_triton(grad_y, q, k, v)


CASES = {
    f"scalar_attention.{key}": Case(
        launch=partial(launch, heads, dtype),
        budgets={
            "scalar_attention_statistics_kernel": kind,
            "scalar_attention_parameters_kernel": SMALL,
            "scalar_attention_tabulate_kernel": ARITHMETIC,
            "scalar_attention_forward_kernel": kind,
            "scalar_attention_grad_queries_kernel": kind,
            "scalar_attention_grad_keys_kernel": kind,
        },
    )
    for key, heads, dtype, kind in (
        ("512_float32", 512, torch.float32, MEMORY),
        ("512_bfloat16", 512, torch.bfloat16, MEMORY),
        ("24_float16", 24, torch.float16, MEMORY),
        ("33_float32", 33, torch.float32, UNALIGNED),
    )
}
