"""Attention with head dimension 1: `scalar_attention` runs it on the best available backend.

The compiled backend, torch.ops.cat_fast.scalar_attention (schema in csrc/ops.cpp), takes time linear in the
sequence length. README.md in this folder describes the method and its error bound.
"""

from collections.abc import Callable
from typing import Any

import torch

from .. import backends, derivatives
from ..autocast import autocast
from ..registration import Operator
from .reference import scalar_attention_reference


def scalar_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute softmax attention of every position to all, with H heads of dimension 1 and scale 1.

    q, k, v: (B, N, H) of one dtype, in any memory order. Returns (B, N, H) of that dtype, contiguous from all
    backends but the reference. Sums are fp32. A non-finite value makes the results of its head NaN.
    Derivatives beyond gradients are computed through the reference. Under autocast it runs in the autocast
    dtype, as F.scaled_dot_product_attention does; float64 is left unchanged.

    Raises ValueError if shapes or dtypes differ.
    """
    q, k, v = autocast(q, k, v)
    if q.dim() != 3 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, v))
        raise ValueError(
            f"scalar_attention: expected q, k, v of one shape (B, N, H) and one dtype, got {given}"
        )
    backend = backends.choose("scalar_attention", q)
    if backend == "reference":
        return scalar_attention_reference(q, k, v)
    return OPERATOR(backend, q, k, v)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _fake_backward(
    grad_y: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _fake(q, k, v), _fake(q, k, v), _fake(q, k, v)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(operator: Any, ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return operator(grad_y, *ctx.saved_tensors)


def _reference_backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return derivatives.vjp(scalar_attention_reference, ctx.saved_tensors, grad_y)


def _flops(q_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Count as torch does for attention: two products of N x N x 1 per head, whatever the method."""
    batch, count, heads = q_shape
    return 2 * (2 * batch * heads * count**2)


def _flops_backward(grad_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Count as torch does for attention: five products of N x N x 1 per head, recomputed scores included."""
    batch, count, heads = grad_shape
    return 5 * (2 * batch * heads * count**2)


def _triton() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from . import triton

    return triton.scalar_attention_triton, triton.scalar_attention_backward_triton


OPERATOR = Operator(
    name="scalar_attention",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    reference_backward=_reference_backward,
    flops=_flops,
    flops_backward=_flops_backward,
)
OPERATOR.register_compiled()
OPERATOR.register_triton(_triton)
