"""Attention with wide heads: `wide_attention` runs it on the best available backend."""

from typing import Any

import torch

from .. import backends, derivatives
from ..autocast import autocast
from ..registration import Operator
from .reference import wide_attention_reference


def wide_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute softmax attention of every position to all positions, with scale 1 / √D.

    q, k, v: (B, N, H, D) of one dtype, in any memory order. Returns (B, N, H, D). Under torch.autocast they
    are first cast to its dtype, except float64, as in F.scaled_dot_product_attention. Derivatives beyond
    gradients are computed through the reference.

    Raises ValueError if shapes or dtypes differ.
    """
    q, k, v = autocast(q, k, v)
    if q.dim() != 4 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, v))
        raise ValueError(
            f"wide_attention: expected q, k, v of one shape (B, N, H, D) and one dtype, got {given}"
        )
    backend = backends.choose("wide_attention", q, head_dim=q.shape[-1])
    if backend == "reference":
        return wide_attention_reference(q, k, v)
    y, _lse = OPERATOR(backend, q, k, v)
    return y


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, count, heads, _ = q.shape
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    return y, q.new_empty((batch, heads, count), dtype=torch.float32)


def _fake_backward(
    grad_y: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _fake(q, k, v)[0], _fake(q, k, v)[0], _fake(q, k, v)[0]


def _setup_context(
    ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]
) -> None:
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs, y, lse)


def _backward(
    operator: Any, ctx: Any, grad_y: torch.Tensor, _: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    return operator(grad_y, *ctx.saved_tensors)


def _reference_backward(ctx: Any, grad_y: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    q, k, v, _y, _lse = ctx.saved_tensors
    return derivatives.vjp(wide_attention_reference, (q, k, v), grad_y)


def _flops(q_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Count as torch does for attention: two products of N x N x D per head, without recomputation."""
    batch, count, heads, dim = q_shape
    return 2 * (2 * batch * heads * count**2 * dim)


def _flops_backward(grad_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Count as torch does for attention: five products of N x N x D per head, recomputed scores included."""
    batch, count, heads, dim = grad_shape
    return 5 * (2 * batch * heads * count**2 * dim)


def _triton() -> tuple[Any, Any]:
    from . import triton

    return triton.wide_attention_triton, triton.wide_attention_backward_triton


OPERATOR = Operator(
    name="wide_attention",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    reference_backward=_reference_backward,
    flops=_flops,
    flops_backward=_flops_backward,
)
OPERATOR.register_triton(_triton)
