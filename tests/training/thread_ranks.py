"""Ranks that are threads of the test: what they say to one another is real, and no process has to start.

first, second = on_thread_ranks(2, lambda ranks: make_source(config, ranks))
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from cat_fast.training.runtime.ranks import Ranks

T = TypeVar("T")
PATIENCE = 60
"""Seconds that a rank waits for others; where one raises alone, this ends the test."""


def on_thread_ranks(world_size: int, function: Callable[[Ranks], T]) -> list[T]:
    """What the function returns on each rank, or what the first that raises does."""
    table = _Table(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(function, ThreadRanks(rank, table)) for rank in range(world_size)]
        return [future.result() for future in futures]


class ThreadRanks(Ranks):
    """One of several, in a thread of its own."""

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
    """Where each rank lays down its value and takes those of all."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values
