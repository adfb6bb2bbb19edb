"""Memory of the host that a rank may use."""

import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),  # version 2
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Files below /sys/fs/cgroup with the limit and the use of memory, and the key of memory.stat that the kernel
can reclaim."""


def available_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory that this machine, or the container of this process, has left."""
    available = psutil.virtual_memory().available
    for limit_file, used_file, reclaimable in _CGROUPS:
        try:
            limit, used = (int((cgroups / name).read_text()) for name in (limit_file, used_file))
            stat = dict(
                line.split()
                for line in (cgroups / limit_file).with_name("memory.stat").read_text().splitlines()
            )
            available = min(available, limit - used + int(stat.get(reclaimable, 0)))
        except (OSError, ValueError):  # missing, or "max"
            continue
    return max(0, available)


def memory_per_rank(world_size: int) -> int:
    """Return the available memory of this machine per rank on it."""
    return available_bytes() // int(os.environ.get("LOCAL_SIZE", world_size))  # set by the launcher


@contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Make allocations fail that let this process grow by more than `extra` bytes; `is_out_of_memory`.

    Limits of several threads may overlap: the smallest one holds, and the last one to end restores that of
    the process.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    limit = psutil.Process().memory_info().vms + extra
    _LIMITS.add(limit)
    try:
        yield
    finally:
        _LIMITS.remove(limit)


class _Limits:
    """Limits of address space that are in force in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: list[int] = []
        self._of_process = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def add(self, limit: int) -> None:
        with self._lock:
            if not self._active:
                self._of_process = resource.getrlimit(resource.RLIMIT_AS)
            self._active.append(limit)
            self._apply()

    def remove(self, limit: int) -> None:
        with self._lock:
            self._active.remove(limit)
            self._apply()

    def _apply(self) -> None:
        soft, hard = self._of_process
        finite = [limit for limit in (*self._active, soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(finite) if self._active else soft, hard))


_LIMITS = _Limits()
