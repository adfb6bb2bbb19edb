"""Slots of memory that a process shares with its workers, so that arrays are not copied through pipes."""

import mmap
import os
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike


class SharedMemory(NamedTuple):
    """Memory of a process, which its workers can map."""

    owner: int
    """Id of the process."""
    file: int
    """Its file descriptor, which may be another file's by the time that a worker opens it."""
    identity: tuple[int, int]
    """Device and inode."""
    size: int
    """Bytes."""


class Slot(NamedTuple):
    """A part of shared memory."""

    memory: SharedMemory
    offset: int
    size: int
    """Bytes."""

    def array(self) -> np.ndarray | None:
        """Return its bytes in a worker, (size,) uint8; None if they cannot be mapped."""
        try:
            return np.frombuffer(_map(self.memory), np.uint8, self.size, self.offset)
        except OSError:
            return None


class SharedSlots:
    """Slots of `size` bytes, of which at most `count` are in use at a time.

    The memory has no name: it is freed when no process maps it, however they ended. Its pages exist once they
    are written. If the system does not offer such memory, `take` returns None.
    """

    def __init__(self, size: int, count: int) -> None:
        self._size = size
        self._free: list[int] = []
        if not count or not hasattr(os, "memfd_create"):
            return
        try:
            self._file = os.fdopen(os.memfd_create("cat_fast"), "r+b", buffering=0)
            self._file.truncate(size * count)
            self._map = mmap.mmap(self._file.fileno(), size * count)
        except OSError:  # the system may forbid it, or limit sizes
            return
        file = self._file.fileno()
        self._memory = SharedMemory(os.getpid(), file, _identity(os.fstat(file)), size * count)
        self._free = list(range(count))

    @property
    def free(self) -> int:
        """Number of slots that can be taken."""
        return len(self._free)

    def take(self) -> Slot | None:
        """Return a free slot, or None."""
        return Slot(self._memory, self._free.pop() * self._size, self._size) if self._free else None

    def write(self, slot: Slot, data: bytes) -> None:
        """Write to the start of a slot."""
        self._map[slot.offset : slot.offset + len(data)] = data

    def array(self, slot: Slot, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Return what a worker wrote to a slot."""
        return np.ndarray(shape, dtype, buffer=self._map, offset=slot.offset)

    def release(self, slot: Slot) -> None:
        """Let a slot be taken again. Its arrays must no longer be used."""
        self._free.append(slot.offset // self._size)


@lru_cache(maxsize=2)
def _map(memory: SharedMemory) -> mmap.mmap:
    path = f"/proc/{memory.owner}/fd/{memory.file}"
    _require_same(os.stat(path), memory)  # before opening: a device may react to it
    with open(path, "r+b") as file:
        _require_same(os.fstat(file.fileno()), memory)
        return mmap.mmap(file.fileno(), memory.size)


def _require_same(status: os.stat_result, memory: SharedMemory) -> None:
    if _identity(status) != memory.identity:
        raise OSError(f"{memory} is closed")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
