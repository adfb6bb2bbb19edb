"""GroupNorm + SiLU: `group_norm_silu` runs it on the best available backend."""

from collections.abc import Callable
from typing import Any

import torch

from .. import backends, derivatives
from ..registration import Operator
from .reference import group_norm_silu_reference


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    activation: bool = True,
) -> torch.Tensor:
    """Apply GroupNorm over `groups` groups of channels, then SiLU unless `activation` is False.

    x: (N, C, *spatial), contiguous or channels-last; other layouts are copied. weight, bias: (C,), of x's
    dtype or fp32. Statistics are fp32. The result has x's shape, dtype and memory format, also under
    autocast. Derivatives beyond gradients are computed through the reference.
    """
    backend = backends.choose("group_norm_silu", x)
    if backend == "reference":
        return group_norm_silu_reference(x, weight, bias, groups, eps, activation)
    y, _mean, _rstd = OPERATOR(backend, _dense(x), weight, bias, groups, eps, activation)
    return y


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return x itself if it is contiguous or channels-last, a contiguous copy otherwise."""
    if x.is_contiguous():
        return x
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is not None and x.is_contiguous(memory_format=channels_last):
        return x
    return x.contiguous()


def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, activation: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    statistics = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def _fake_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, ctx.groups, ctx.eps, ctx.activation = inputs
    _y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(
    operator: Any, ctx: Any, grad_y: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return (*operator(grad_y, *ctx.saved_tensors, ctx.groups, ctx.activation), None, None, None)


def _reference_backward(
    ctx: Any, grad_y: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, _mean, _rstd = ctx.saved_tensors

    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return group_norm_silu_reference(x, weight, bias, ctx.groups, ctx.eps, ctx.activation)

    return (*derivatives.vjp(forward, (x, weight, bias), grad_y), None, None, None)


def _triton() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from . import triton

    return triton.group_norm_silu_triton, triton.group_norm_silu_backward_triton


OPERATOR = Operator(
    name="group_norm_silu",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    reference_backward=_reference_backward,
)
OPERATOR.register_compiled()
OPERATOR.register_triton(_triton)
