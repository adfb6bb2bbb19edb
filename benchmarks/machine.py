"""The machine that a benchmark runs on: what it is, and the most memory that a piece of work takes on it."""

import ctypes
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Peak:
    """What the data sheet of a GPU promises."""

    bytes_per_second: float
    tensor_flops_per_second: float
    """Of bfloat16 and float16, dense."""
    float32_flops_per_second: float
    """Without tensor cores."""

    def flops_per_second(self, dtype: str) -> float:
        return self.float32_flops_per_second if dtype == "float32" else self.tensor_flops_per_second


PEAKS = {  # by the name that CUDA gives the card
    "A100-SXM4-40GB": Peak(1555e9, 312e12, 19.5e12),
    "A100-PCIE-40GB": Peak(1555e9, 312e12, 19.5e12),
    "A100-SXM4-80GB": Peak(2039e9, 312e12, 19.5e12),
    "A100 80GB PCIe": Peak(1935e9, 312e12, 19.5e12),
    "H100 80GB HBM3": Peak(3350e9, 989e12, 67e12),
    "H100 PCIe": Peak(2000e9, 756e12, 51e12),
    "H200": Peak(4800e9, 989e12, 67e12),
}


def peak() -> Peak | None:
    """That of the GPU in use; None on a CPU, or for a card that `PEAKS` does not know."""
    if not torch.cuda.is_initialized():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAKS.items() if known in name), None)


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
