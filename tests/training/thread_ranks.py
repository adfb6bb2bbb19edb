"""Ranks as threads of the test process, with real collectives and without starting processes.

first, second = on_thread_ranks(2, lambda ranks: make_source(config, ranks))
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from cat_fast.training.runtime.ranks import Ranks

T = TypeVar("T")
TIMEOUT = 60
"""Seconds that a rank waits for the others, so that a rank that raises alone does not hang the test."""


def on_thread_ranks(world_size: int, function: Callable[[Ranks], T]) -> list[T]:
    """Return the function's results on all ranks, or raise the first rank's exception."""
    table = _Table(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(function, ThreadRanks(rank, table)) for rank in range(world_size)]
        return [future.result() for future in futures]


class ThreadRanks(Ranks):
    """One of several ranks, each in its own thread."""

    def __init__(self, rank: int, table: "_Table") -> None:
        super().__init__(rank=rank, world_size=len(table.values))
        object.__setattr__(self, "table", table)

    def barrier(self) -> None:
        self.gather(None)

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        return self.table.exchange(self.rank, value)  # type: ignore[attr-defined]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.copy_(torch.stack(self.gather(values.clone())).sum(0))


class _Table:
    """Shared table in which ranks exchange their values."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values
