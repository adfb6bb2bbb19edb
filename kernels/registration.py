"""What torch has to be told of an operator, alike for the compiled one and its Triton twin.

The compiled operator cat_fast::<op> has its schema in csrc/ops.cpp and an implementation a device; the Triton
operator cat_fast::<op>_triton is defined from annotated Python functions. Both get the same fake
implementation, gradient and FLOP count here, so that torch.compile, checkpointing and FLOP counters see them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import backends, library


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A differentiable operator: forward and backward, each an operator of its own."""

    name: str
    fake: Callable[..., Any]
    """Outputs without values, from the forward operator's arguments."""
    fake_backward: Callable[..., Any]
    """Gradients without values, from the backward operator's arguments."""
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

    def register_triton(
        self, implementations: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]]
    ) -> None:
        """Define cat_fast::<name>_triton and its backward where Triton can run.

        `implementations` imports and returns the forward and the backward function, whose annotations are the
        schemas; they write to none of their arguments.
        """
        if backends.triton_obstacle() is not None:
            return
        forward, backward = implementations()
        torch.library.custom_op(f"cat_fast::{self.name}_triton", forward, mutates_args=())
        torch.library.custom_op(f"cat_fast::{self.name}_backward_triton", backward, mutates_args=())
        self._register("_triton")

    def __call__(self, backend: str, *arguments: Any) -> Any:
        """Run it on a backend that is no reference."""
        return _operator(self.name, "_triton" if backend == "triton" else "")(*arguments)

    def _register(self, suffix: str) -> None:
        forward, backward = f"cat_fast::{self.name}{suffix}", f"cat_fast::{self.name}_backward{suffix}"
        backward_operator = _operator(f"{self.name}_backward", suffix)
        torch.library.register_fake(forward, self.fake)
        torch.library.register_fake(backward, self.fake_backward)
        torch.library.register_autograd(
            forward, partial(self.backward, backward_operator), setup_context=self.setup_context
        )
        if self.flops is not None:
            register_flop_formula(_operator(self.name, suffix), self.flops_from_values)(self.flops)
        if self.flops_backward is not None:
            register_flop_formula(backward_operator, self.flops_from_values)(self.flops_backward)


def _operator(name: str, suffix: str) -> Any:
    return getattr(torch.ops.cat_fast, name + suffix)
