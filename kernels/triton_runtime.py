"""What every Triton launcher needs around its kernels."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch

TYPICAL_MULTIPROCESSORS = 132
"""Of an H100, for tensors that are on no GPU: kernels compiled or interpreted without one."""


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes x's GPU the current one, as Triton launches on that; nothing for other tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def multiprocessors(x: torch.Tensor) -> int:
    """How many multiprocessors x's GPU has."""
    return _multiprocessors(x.device) if x.is_cuda else TYPICAL_MULTIPROCESSORS


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
