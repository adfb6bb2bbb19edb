"""Helpers shared by all Triton launchers."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch

TYPICAL_MULTIPROCESSORS = 132
"""Multiprocessors of an H100, assumed for tensors that are not on a GPU (kernels compiled or interpreted)."""


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Make x's GPU the current device, on which Triton launches; do nothing for other tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def multiprocessors(x: torch.Tensor) -> int:
    """Return the number of multiprocessors of x's GPU."""
    return _multiprocessors(x.device) if x.is_cuda else TYPICAL_MULTIPROCESSORS


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
