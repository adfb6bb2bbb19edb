"""GroupNorm + SiLU: `group_norm_silu` runs it on the best available backend."""

from collections.abc import Callable
from typing import Any

import torch

from .. import backends, derivatives
from ..registration import Operator
from .reference import group_norm_silu_reference, per_channel


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    activation: bool = True,
    input_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply GroupNorm over `groups` groups of channels, then SiLU unless `activation` is False.

    x: (N, C, *spatial), contiguous or channels-last; other layouts are copied. weight, bias, input_bias:
    (C,), of x's dtype or fp32. Statistics are fp32. The result has x's shape, dtype and memory format, also
    under autocast. Derivatives beyond gradients are computed through the reference.

    With input_bias, such as the bias of the convolution that computed x, the input is x + input_bias. On GPUs
    no pass over x adds it: it shifts what the kernels subtract from each channel.
    """
    backend = backends.choose("group_norm_silu", x)
    if backend == "reference":
        return group_norm_silu_reference(x, weight, bias, groups, eps, activation, input_bias)
    x = _dense(x)
    if backend == "cpp" and input_bias is not None:  # there is no fused kernel for CPUs
        x, input_bias = (x + per_channel(input_bias, x)).to(x.dtype), None
    if input_bias is None:
        y, *_statistics = OPERATOR(backend, x, weight, bias, groups, eps, activation)
    else:
        y, *_statistics = BIASED(backend, x, weight, bias, input_bias, groups, eps, activation)
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


def _fake_biased(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    input_bias: torch.Tensor,
    groups: int,
    eps: float,
    activation: bool,
) -> tuple[torch.Tensor, ...]:
    y, _mean, rstd = _fake(x, weight, bias, groups, eps, activation)
    center = x.new_empty(x.shape[:2], dtype=torch.float32)
    return y, center, rstd, torch.empty_like(center)


def _fake_biased_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    input_bias: torch.Tensor,
    center: torch.Tensor,
    rstd: torch.Tensor,
    deviation: torch.Tensor,
    groups: int,
    activation: bool,
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (x, weight, bias, input_bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.groups, ctx.eps, ctx.activation = inputs
    _y, *statistics = output
    ctx.tensors = len(tensors)
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(*tensors, *statistics)


def _backward(
    operator: Any, ctx: Any, grad_y: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return (*operator(grad_y, *ctx.saved_tensors, ctx.groups, ctx.activation), None, None, None)


def _reference_backward(
    ctx: Any, grad_y: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    def forward(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, input_bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return group_norm_silu_reference(x, weight, bias, ctx.groups, ctx.eps, ctx.activation, input_bias)

    return (*derivatives.vjp(forward, ctx.saved_tensors[: ctx.tensors], grad_y), None, None, None)


OPERATOR = Operator(
    name="group_norm_silu",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    reference_backward=_reference_backward,
)
BIASED = Operator(
    name="group_norm_silu_biased",
    fake=_fake_biased,
    fake_backward=_fake_biased_backward,
    setup_context=_setup_context,
    backward=_backward,
    reference_backward=_reference_backward,
)


def _triton() -> tuple[Callable[..., Any], ...]:
    from .triton import group_norm_silu_backward_triton, group_norm_silu_triton

    return group_norm_silu_triton, group_norm_silu_backward_triton


def _triton_biased() -> tuple[Callable[..., Any], ...]:
    from .triton import group_norm_silu_biased_backward_triton, group_norm_silu_biased_triton

    return group_norm_silu_biased_triton, group_norm_silu_biased_backward_triton


for _operator, _implementations in ((OPERATOR, _triton), (BIASED, _triton_biased)):
    _operator.register_compiled()
    _operator.register_triton(_implementations)
