"""The gradient norm of a step, computed once: the guard's serves DeepSpeed's clipping as well."""

import math
from typing import Any

import torch


def use_norm(engine: Any, square: float) -> None:
    """Let the next `engine.step()` clip by a known norm of all ranks' gradients.

    Under ZeRO 1 and 2, DeepSpeed would compute the norm again, in several launches per tensor, an all-reduce
    and a wait for the device. Other engines compute it themselves.

    Args:
        square: sum of squares of the gradients of all ranks, finite.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "scaled_global_norm") and not offloads(optimizer):
        norm = torch.tensor(math.sqrt(square), dtype=torch.float32)  # on the CPU, where reading it is free
        optimizer.scaled_global_norm = lambda norm_type=2: norm


def offloads(optimizer: Any) -> bool:
    """Return True if the optimiser's state is on the CPU."""
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))
