"""Derivatives that the kernels do not have, computed through the reference.

A kernel computes an operator's outputs, and another one their gradients. Everything else is derived by torch
from the reference: gradients of gradients (create_graph=True), forward mode (torch.func.jvp), and the
transforms of torch.func, such as grad, vjp and vmap. This holds for every backend, also for a forced one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

_BATCHED_GRADIENTS = torch._C._dispatch_key_parse("VmapMode")
"""Set within torch.autograd.grad(..., is_grads_batched=True)."""


@torch.compiler.assume_constant_result
def transformed() -> bool:
    """Return True in forward-mode AD, transforms of torch.func and backward passes of batched gradients."""
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included(_BATCHED_GRADIENTS)
    )


def beyond_first() -> bool:
    """Return True in a backward pass whose gradients will be differentiated or transformed themselves."""
    return torch.is_grad_enabled() or transformed()


def vjp(function: Callable[..., Any], inputs: Sequence[torch.Tensor], grads: Any) -> tuple[torch.Tensor, ...]:
    """Return the gradients of `function` in its inputs, as differentiable functions of `inputs` and `grads`.

    grads: the gradients of the outputs, in the same structure and dtypes.
    """
    if torch._C._are_functorch_transforms_active():
        outputs_and_pullback: Any = torch.func.vjp(function, *inputs)
        return outputs_and_pullback[1](grads)
    # torch.func.vjp itself would refuse saved-tensor hooks, such as those of checkpointing
    with torch.enable_grad():
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        outputs = function(*inputs)
    return torch.autograd.grad(outputs, inputs, grads, create_graph=torch.is_grad_enabled())


def with_formula(
    formula: Callable[..., torch.Tensor], function: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> torch.Tensor:
    """Return function(*inputs), for a function of torch that is only differentiable once.

    Its outputs and gradients are kept, bit for bit; all other derivatives are those of `formula`, which
    computes the same from plain operations.
    """
    if transformed():
        return formula(*inputs)
    y = function(*inputs)
    # torch.compile itself refuses second derivatives
    if torch.compiler.is_compiling() or not y.requires_grad:
        return y
    return _WithFormula.apply(y, formula, *inputs)


class _WithFormula(torch.autograd.Function):
    """The identity of y, whose gradient bypasses y in passes beyond the first."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, formula: Callable[..., torch.Tensor], *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.formula = formula
        ctx.save_for_backward(*inputs)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not beyond_first():
            return (grad, *[None] * (len(ctx.needs_input_grad) - 1))

        def formula(*inputs: torch.Tensor) -> torch.Tensor:
            return ctx.formula(*inputs).to(grad.dtype)  # y may be of an autocast dtype

        return (None, None, *vjp(formula, ctx.saved_tensors, grad))


def refuse(operator: Any, arguments: Sequence[Any], has_gradient: bool) -> None:
    """Raise NotImplementedError if the result of a kernel would lack a requested derivative.

    This protects direct calls of torch.ops.cat_fast only; the public functions run the reference instead.
    """
    tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
    reverse = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if has_gradient and not torch._C._are_functorch_transforms_active():
        reverse = False
    if reverse or (forward_ad._current_level >= 0 and any(map(_has_tangent, tensors))):
        raise NotImplementedError(
            f"{operator}: this derivative is not implemented by the kernel; call the operator's function in "
            "cat_fast.kernels, which differentiates the reference, instead of torch.ops.cat_fast"
        )


def _has_tangent(x: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None
