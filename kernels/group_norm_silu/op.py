"""GroupNorm + SiLU: `group_norm_silu` runs it with the best backend there is.

The compiled backends are one torch operator, torch.ops.cat_fast.group_norm_silu (schema in csrc/ops.cpp),
with an implementation a device; here it gets its fake implementation and its gradient, so that
torch.compile, checkpointing and FLOP counters see it.
"""

from typing import Any

import torch

from .. import backends, library
from .reference import group_norm_silu_reference


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    activation: bool = True,
) -> torch.Tensor:
    """GroupNorm over `groups` groups of channels, then SiLU unless `activation` is False.

    x: (N, C, *spatial), contiguous or channels-last (else it is copied). weight, bias: (C,), of x's dtype
    or fp32. Statistics are fp32; y has x's shape, dtype and memory format. Differentiable once; where
    second derivatives are needed, use the reference.
    """
    if backends.choose("group_norm_silu", x) == "reference":
        return group_norm_silu_reference(x, weight, bias, groups, eps, activation)
    y, _mean, _rstd = torch.ops.cat_fast.group_norm_silu(_dense(x), weight, bias, groups, eps, activation)
    return y


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if the kernels can walk its memory, a contiguous copy otherwise."""
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
    x, weight, bias, ctx.groups, _eps, ctx.activation = inputs
    _y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(
    ctx: Any, grad_y: torch.Tensor, _grad_mean: torch.Tensor | None, _grad_rstd: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    gradients = torch.ops.cat_fast.group_norm_silu_backward(
        grad_y, *ctx.saved_tensors, ctx.groups, ctx.activation
    )
    return (*gradients, None, None, None)


if library.load("_ops") is None:
    torch.library.register_fake("cat_fast::group_norm_silu", _fake)
    torch.library.register_fake("cat_fast::group_norm_silu_backward", _fake_backward)
    torch.library.register_autograd("cat_fast::group_norm_silu", _backward, setup_context=_setup_context)
