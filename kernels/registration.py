"""What torch has to be told of an operator, alike for the compiled one and its Triton twin.

The compiled operator cat_fast::<op> has its schema in csrc/ops.cpp and an implementation a device; the Triton
operator cat_fast::<op>_triton is defined from annotated Python functions. Both get the same fake
implementation, gradient and FLOP count here, so that torch.compile, checkpointing and FLOP counters see them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import backends, library


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A differentiable operator: forward and backward, each an operator of its own."""

    name: str
    adjoint: str | None = None
    """The operator that is its backward, where that is an `Operator` of its own; else <name>_backward is."""
    fake: Callable[..., Any]
    """Outputs without values, from the forward operator's arguments."""
    fake_backward: Callable[..., Any] | None = None
    """Gradients without values, from <name>_backward's arguments."""
    setup_context: Callable[..., None]
    """(ctx, inputs, output), as torch.library.register_autograd has it."""
    backward: Callable[..., Any]
    """(backward operator, ctx, *gradients of the outputs) -> a gradient or None for each input."""
    flops: Callable[..., int] | None = None
    """From the forward operator's arguments, tensors as their shapes."""
    flops_backward: Callable[..., int] | None = None
    flops_from_values: bool = False
    """Whether the two are given the tensors themselves instead of their shapes."""

    def register_compiled(self) -> None:
        """Tell torch of cat_fast::<name> and <name>_backward, if the compiled library is there."""
        if library.load("_ops") is None:
            self._register("")

    def register_triton(self, implementations: Callable[[], tuple[Callable[..., Any], ...]]) -> None:
        """Define cat_fast::<name>_triton and its backward where Triton can run.

        `implementations` imports and returns the forward and, unless there is an adjoint, the backward
        function, whose annotations are the schemas; they write to none of their arguments.
        """
        if backends.triton_obstacle() is not None:
            return
        names = (self.name,) if self.adjoint else (self.name, f"{self.name}_backward")
        for name, implementation in zip(names, implementations(), strict=True):
            torch.library.custom_op(f"cat_fast::{name}_triton", implementation, mutates_args=())
        self._register("_triton")

    def __call__(self, backend: str, *arguments: Any) -> Any:
        """Run it on a backend that is no reference."""
        return _operator(self.name, "_triton" if backend == "triton" else "")(*arguments)

    def _register(self, suffix: str) -> None:
        backward_name = self.adjoint or f"{self.name}_backward"

        def backward(ctx: Any, *grads: Any) -> Any:  # an adjoint may be defined later
            return self.backward(_operator(backward_name, suffix), ctx, *grads)

        forward = f"cat_fast::{self.name}{suffix}"
        torch.library.register_fake(forward, self.fake)
        torch.library.register_autograd(forward, backward, setup_context=self.setup_context)
        if self.fake_backward is not None:
            torch.library.register_fake(f"cat_fast::{backward_name}{suffix}", self.fake_backward)
        if self.flops is not None:
            register_flop_formula(_operator(self.name, suffix), self.flops_from_values)(self.flops)
        if self.flops_backward is not None:
            register_flop_formula(_operator(backward_name, suffix), self.flops_from_values)(
                self.flops_backward
            )


def _operator(name: str, suffix: str) -> Any:
    return getattr(torch.ops.cat_fast, name + suffix)
