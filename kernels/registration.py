"""Registration of operators with torch, shared by the compiled and the Triton implementation.

The compiled operator cat_fast::<op> has its schema in csrc/ops.cpp and one implementation per device. The
Triton operator cat_fast::<op>_triton is defined from annotated Python functions. Both get the same fake
implementation, gradient and FLOP count here, for torch.compile, checkpointing and FLOP counters. Derivatives
beyond the first are computed through the reference (`derivatives`).

torch.library.custom_op and register_autograd would do the same with more work per call, such as a check for
aliases among inputs and outputs: `benchmarks/dispatch.py` measures the difference.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._library.autograd import Info, make_autograd_impl
from torch.utils.flop_counter import register_flop_formula

from . import backends, derivatives, library

_LIBRARY = torch.library.Library("cat_fast", "FRAGMENT")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A differentiable operator whose forward and backward are two torch operators."""

    name: str
    adjoint: str | None = None
    """Name of the `Operator` that is its backward; by default the backward is <name>_backward."""
    fake: Callable[..., Any]
    """Computes the outputs' metadata from the forward operator's arguments."""
    fake_backward: Callable[..., Any] | None = None
    """Computes the gradients' metadata from the arguments of <name>_backward."""
    setup_context: Callable[..., None]
    """(ctx, inputs, output), as in torch.library.register_autograd."""
    backward: Callable[..., Any]
    """(backward operator, ctx, *gradients of the outputs) -> a gradient or None per input."""
    reference_backward: Callable[..., Any]
    """(ctx, *gradients of the outputs) -> the same, through the reference, and itself differentiable."""
    flops: Callable[..., int] | None = None
    """FLOPs from the forward operator's arguments, with shapes in place of tensors."""
    flops_backward: Callable[..., int] | None = None
    flops_from_values: bool = False
    """True if the two FLOP formulas receive the tensors themselves instead of their shapes."""
    overloads: dict[str, Any] = field(default_factory=dict, compare=False)
    """Registered torch operators by backend: "triton", or "" for those that are compiled."""

    def register_compiled(self) -> None:
        """Register cat_fast::<name> and <name>_backward if the compiled library has them.

        A library may be older than an operator that only GPUs run, which `library.load` does not require.
        """
        if library.load("_ops") is None and hasattr(torch.ops.cat_fast, self.name):
            self._register("")

    def register_triton(self, implementations: Callable[[], tuple[Callable[..., Any], ...]]) -> None:
        """Define cat_fast::<name>_triton and its backward if Triton can run.

        `implementations` imports and returns the forward function and, unless there is an adjoint, the
        backward function. Their annotations are the schemas; they must not mutate their arguments.
        """
        if backends.triton_unavailable_reason() is not None:
            return
        names = (self.name,) if self.adjoint else (self.name, f"{self.name}_backward")
        for name, implementation in zip(names, implementations(), strict=True):
            schema = torch.library.infer_schema(implementation, mutates_args=())
            _LIBRARY.define(f"{name}_triton{schema}", tags=torch.Tag.pt2_compliant_tag)
            _LIBRARY.impl(f"{name}_triton", _hidden(implementation), "CompositeExplicitAutograd")
        self._register("_triton")

    def __call__(self, backend: str, *arguments: Any) -> Any:
        """Run it on any backend except the reference."""
        return self.overloads["triton" if backend == "triton" else ""](*arguments)

    def _register(self, suffix: str) -> None:
        backward_name = self.adjoint or f"{self.name}_backward"

        def run_backward_operator(*arguments: Any) -> Any:
            operator = _overload(backward_name + suffix)  # an adjoint may be defined afterwards
            with torch._C._AutoDispatchBelowAutograd():  # skips the check of direct calls, which costs time
                return operator(*arguments)

        def backward(ctx: Any, *grads: Any) -> Any:
            if derivatives.beyond_first():
                return self.reference_backward(ctx, *grads)
            return self.backward(run_backward_operator, ctx, *grads)

        self.overloads[suffix.removeprefix("_")] = _overload(self.name + suffix)
        forward = f"cat_fast::{self.name}{suffix}"
        torch.library.register_fake(forward, self.fake)
        _register_autograd(self.name + suffix, Info(backward, self.setup_context))
        if self.adjoint is None:
            _register_autograd(backward_name + suffix, None)
        if self.fake_backward is not None:
            torch.library.register_fake(f"cat_fast::{backward_name}{suffix}", self.fake_backward)
        if self.flops is not None:
            packet = getattr(torch.ops.cat_fast, self.name + suffix)
            register_flop_formula(packet, self.flops_from_values)(self.flops)
        if self.flops_backward is not None:
            packet = getattr(torch.ops.cat_fast, backward_name + suffix)
            register_flop_formula(packet, self.flops_from_values)(self.flops_backward)


def _register_autograd(name: str, info: Info | None) -> None:
    """Register the gradient of an operator, or None if it has none, and refuse all other derivatives."""
    operator = _overload(name)
    below = torch._C._after_autograd_keyset
    differentiable = _gradient(operator, info) if info is not None else None

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if differentiable is None or derivatives.transformed():
            derivatives.refuse(operator, arguments, has_gradient=differentiable is not None)
        if differentiable is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return differentiable(keyset, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & below, *arguments)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _gradient(operator: Any, info: Info) -> Callable[..., Any]:
    """Return (keyset, *arguments) -> outputs with a gradient."""
    schema = operator._schema
    if any(str(each.type) == "List[Tensor]" for each in (*schema.arguments, *schema.returns)):
        return make_autograd_impl(operator, info)
    assert info._setup_context_fn is not None
    assert info._backward_fn is not None
    setup_context, differentiate = info._setup_context_fn, info._backward_fn
    below = torch._C._after_autograd_keyset

    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, keyset = arguments
        with torch._C._AutoDispatchBelowAutograd():
            outputs = operator.redispatch(keyset & below, *inputs)
            setup_context(ctx, inputs, outputs)
        return outputs

    def backward(ctx: Any, *grads: Any) -> Any:
        return (*differentiate(ctx, *grads), None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(schema.name.replace("::", "_"), (torch.autograd.Function,), methods)
    apply = function.apply

    def differentiable(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        return apply(*arguments, keyset)

    return differentiable


def _hidden(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which torch.compile does not trace where a graph calls it."""
    disabled = torch.compiler.disable(implementation)

    def run(*arguments: Any) -> Any:
        if get_eval_frame_callback() is None:  # nothing is compiled: the usual case, without the wrapper
            return implementation(*arguments)
        return disabled(*arguments)

    return run


@functools.cache
def _overload(name: str) -> Any:
    return getattr(torch.ops.cat_fast, name).default
