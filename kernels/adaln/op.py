"""Adaptive LayerNorm over packed tokens: `adaln`, and `gate_residual_adaln`, fused with the gated residual.

Both read one modulation row per sequence, as a view with any strides, and never expand it to tokens.

Shapes: S sequences, T tokens, D features.
"""

from typing import Any

import torch

from .. import backends, derivatives
from ..registration import Operator
from .reference import adaln_reference, gate_residual_adaln_reference, gate_residual_reference

_HALF = (torch.bfloat16, torch.float16)


def adaln(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, cu_seqlens: torch.Tensor, eps: float
) -> torch.Tensor:
    """Compute LayerNorm(x) * (1 + scale) + shift, with each token modulated by the row of its sequence.

    x: (T, D). shift, scale: (S, D), of x's dtype or fp32, with any strides. cu_seqlens: int32 (S + 1,),
    rising from 0 to T; sequences may be empty. Statistics are fp32. The result has x's shape and dtype, also
    under autocast. Derivatives beyond gradients are computed through the reference.

    Raises ValueError if shapes or dtypes do not match. On the CPU, raises RuntimeError for invalid values of
    cu_seqlens; on a GPU they are not checked, since that would synchronize.
    """
    backend = backends.choose("adaln", x)
    shift, scale = _in_stream_dtype(backend, x, shift, scale)
    _check(x, cu_seqlens, shift=shift, scale=scale)
    if backend == "reference":
        return adaln_reference(x, shift, scale, cu_seqlens, eps)
    y, _mean, _rstd = ADALN(backend, x, shift, scale, cu_seqlens, eps)
    return y


def gate_residual_adaln(
    x: torch.Tensor,
    h: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x_new = x + gate * h and y = adaln(x_new, shift, scale), in one pass over the tokens.

    h: (T, D), of x's dtype; gate: (S, D), of the dtype of shift and scale. Under autocast, y has the dtype of
    h, in which the next linear layer computes, and x_new that of x. Everything else is as in `adaln`.
    """
    backend = backends.choose("gate_residual_adaln", x)
    gate, shift, scale = _in_stream_dtype(backend, x, gate, shift, scale)
    _check(x, cu_seqlens, gate=gate, shift=shift, scale=scale)
    if h.shape != x.shape or (h.dtype != x.dtype and not _is_autocast(x)):
        raise ValueError(f"h: expected {_format_tensor(x)} like x, got {_format_tensor(h)}")
    branch = h if backend == "triton" else h.to(x.dtype)  # Triton converts while it loads and stores
    if backend == "reference":
        x_new, y = gate_residual_adaln_reference(x, branch, gate, shift, scale, cu_seqlens, eps)
    else:
        x_new, y, *_ = GATE_RESIDUAL_ADALN(backend, x, branch, gate, shift, scale, cu_seqlens, eps)
    return x_new, y.to(h.dtype)


def _in_stream_dtype(backend: str, x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast, cast the outputs of linear layers to the dtype of x, the residual stream.

    Triton converts them while it loads them, without a launch for each.
    """
    return tuple(t.to(x.dtype) for t in others) if _is_autocast(x) and backend != "triton" else others


def _is_autocast(x: torch.Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _check(x: torch.Tensor, cu_seqlens: torch.Tensor, **modulation: torch.Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected (T, D) of a float dtype, got {_format_tensor(x)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens: expected (S + 1,) int32, got {_format_tensor(cu_seqlens)}")
    shape = (cu_seqlens.shape[0] - 1, x.shape[1])
    dtype = modulation["scale"].dtype
    for name, rows in modulation.items():
        fits = dtype in (x.dtype, torch.float32) or (_is_autocast(x) and dtype in _HALF)
        if rows.shape != shape or rows.dtype != dtype or not fits:
            raise ValueError(
                f"{name}: expected {tuple(shape)}, one row per sequence, all of {x.dtype} or all of "
                f"torch.float32, got {_format_tensor(rows)}"
            )


def _format_tensor(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _dense(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = x.new_empty(x.shape[0], dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _fake(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, cu_seqlens: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    return _dense(x), *_statistics(x)


def _fake_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    return _dense(x), _dense(scale), _dense(scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, _shift, scale, cu_seqlens, ctx.eps = inputs
    _y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, cu_seqlens, mean, rstd)


def _backward(
    operator: Any, ctx: Any, grad_y: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return (*operator(grad_y, *ctx.saved_tensors), None, None)


def _reference_backward(
    ctx: Any, grad_y: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    x, scale, cu_seqlens, _mean, _rstd = ctx.saved_tensors
    return (*_reference_gradients(x, scale, cu_seqlens, ctx.eps, grad_y), None, None)


def _reference_gradients(
    x: torch.Tensor, scale: torch.Tensor, cu_seqlens: torch.Tensor, eps: float, grad_y: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of x, shift and scale, none of which depends on shift."""

    def forward(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return adaln_reference(x, shift, scale, cu_seqlens, eps)

    return derivatives.vjp(forward, (x, torch.zeros_like(scale), scale), grad_y.to(x.dtype))


ADALN = Operator(
    name="adaln",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    reference_backward=_reference_backward,
)


def _fake_gated(
    x: torch.Tensor,
    h: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    return _dense(x), _dense(h), *_statistics(x)


def _fake_gated_backward(
    grad_x_new: torch.Tensor,
    grad_y: torch.Tensor,
    x_new: torch.Tensor,
    h: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    return _dense(x_new), _dense(h), _dense(scale), _dense(scale), _dense(scale)


def _setup_gated_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _x, h, gate, _shift, scale, cu_seqlens, ctx.eps = inputs
    x_new, _y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x_new, h, gate, scale, cu_seqlens, mean, rstd)


def _gated_backward(
    operator: Any, ctx: Any, grad_x_new: torch.Tensor, grad_y: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return (*operator(grad_x_new, grad_y, *ctx.saved_tensors), None, None)


def _reference_gated_backward(
    ctx: Any, grad_x_new: torch.Tensor, grad_y: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    x_new, h, gate, scale, cu_seqlens, _mean, _rstd = ctx.saved_tensors
    grad_x, grad_shift, grad_scale = _reference_gradients(x_new, scale, cu_seqlens, ctx.eps, grad_y)
    grad_x = grad_x + grad_x_new

    def forward(h: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gate_residual_reference(torch.zeros_like(x_new), h, gate, cu_seqlens)

    grad_h, grad_gate = derivatives.vjp(forward, (h, gate), grad_x)
    return grad_x, grad_h, grad_gate, grad_shift, grad_scale, None, None


GATE_RESIDUAL_ADALN = Operator(
    name="gate_residual_adaln",
    fake=_fake_gated,
    fake_backward=_fake_gated_backward,
    setup_context=_setup_gated_context,
    backward=_gated_backward,
    reference_backward=_reference_gated_backward,
)


def _triton_adaln() -> tuple[Any, Any]:
    from .triton import adaln_backward, adaln_forward

    return adaln_forward, adaln_backward


def _triton_gate_residual_adaln() -> tuple[Any, Any]:
    from .triton import gate_residual_adaln_backward, gate_residual_adaln_forward

    return gate_residual_adaln_forward, gate_residual_adaln_backward


for _operator, _triton in ((ADALN, _triton_adaln), (GATE_RESIDUAL_ADALN, _triton_gate_residual_adaln)):
    _operator.register_compiled()
    _operator.register_triton(_triton)
