"""The machine that a benchmark runs on: what it is, and the most memory that a piece of work takes on it."""

import ctypes
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cat_fast.cli.info import environment

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def describe() -> dict[str, Any]:
    """Processor, GPUs, threads and versions; no names of hosts or of kernels built for one, and no path."""
    found = environment()
    # The reasons why other backends are not active may hold paths.
    active = [f"{row['op']}.{row['backend']}" for row in found["kernels"] if row["status"] == "active"]
    return found | {"kernels": active, "platform": f"{platform.system()} {platform.machine()}"}


def synchronize() -> None:
    """Wait for the GPU, if there is one, so that a clock sees the work and not only its launch."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """By how much one call raises the memory in use, at its height; None where the system does not tell.

    Memory of the GPU once it is in use, else of the process: not that of torch's allocator alone, so that
    the buffers of other libraries count. For tensors below 32 MiB so do the gaps of the C library's heap.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory that the process kept would hide what is taken
    try:
        _CLEAR_REFS.write_text("5")  # sets the peak to what is in use now: proc(5)
        before = _resident("VmHWM")
    except OSError:
        run()
        return None
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
