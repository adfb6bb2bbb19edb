"""Stand-ins for parameters, whose gradients reach neither the parameters nor an engine's hooks."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def stand_in_parameters(*modules: nn.Module) -> Iterator[None]:
    """Replace the parameters of modules by others with the same memory, without gradients and hooks.

    Forward and backward passes then change nothing, and communicate nothing under ZeRO 0 to 2. Do not use it
    under ZeRO 3, which keeps its state in the parameters.
    """
    owned = [
        (owner, name, parameter)
        for module in modules
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
    ]
    stand_ins = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for _, _, p in owned}
    try:
        for owner, name, parameter in owned:
            owner._parameters[name] = stand_ins[id(parameter)]
        yield
    finally:
        for owner, name, parameter in owned:
            owner._parameters[name] = parameter
