"""The machine that a benchmark runs on, and the peak memory of a function on it."""

import ctypes
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cat_fast.cli.info import environment

ROOT = Path(__file__).parents[2]
DIRTY = "+"
"""Suffix of a commit with uncommitted changes."""
RESULTS = "benchmarks/results"
"""Committed results, which are deleted to be measured again: their changes do not count."""
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def describe() -> dict[str, Any]:
    """Return processor, GPUs, threads, versions and commit, without host names, kernel names or paths."""
    found = environment()
    # The reasons why other backends are inactive may contain paths.
    active = [f"{row['op']}.{row['backend']}" for row in found["kernels"] if row["status"] == "active"]
    system = f"{platform.system()} {platform.machine()}"
    return found | {"kernels": active, "platform": system, "commit": commit()}


@cache
def commit(root: Path = ROOT) -> str | None:
    """Return the short hash of the checked-out commit, with `DIRTY` if files differ; None outside of git."""
    found = _git(root, "rev-parse", "--short", "HEAD", "--show-prefix")
    if found is None or len(found.split()) != 1:  # a folder inside another repository has a prefix
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS}")
    return found.strip() + (DIRTY if changed else "")


def is_dirty(revision: str | None) -> bool:
    """Return True if files differed from the commit; two such trees of one commit may differ as well."""
    return revision is not None and revision.endswith(DIRTY)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def synchronize() -> None:
    """Wait for the GPU, if any, so that a clock measures the work and not only its launch."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Return the peak increase of memory in use during one call; None if the system does not report it.

    Measures memory of the GPU once it is in use, else of the process, including buffers of libraries other
    than torch. For tensors below 32 MiB, gaps of the C library's heap count as well.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # freed memory kept by the process would hide new allocations
    try:
        _CLEAR_REFS.write_text("5")  # resets the peak to the memory in use: proc(5)
        before = _resident("VmHWM")
    except OSError:
        run()
        return None
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
