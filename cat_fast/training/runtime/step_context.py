"""The step a rank is processing and its busy time, for diagnostics (guard, watchdog, straggler detection)."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from cat_fast.hardware import run_device_type


@dataclass
class StepContext:
    """The current step of this rank, its batches, and the rank's busy time per step.

    A rank is busy from `begin` or `stop_waiting` to the next `start_waiting`: it reads data or computes
    before it waits for other ranks. On a GPU the time is measured on the device, between two events.
    """

    step: int = 0
    batches: Sequence[str] = ()
    """Descriptions of the step's batches, one per accumulation step."""
    _busy_since: Any = None
    _spans: list[tuple[int, Any, Any]] = field(default_factory=list)
    _listener: Callable[[], None] | None = None

    def begin(self, step: int) -> None:
        self.step, self.batches = step, ()
        self._busy_since = _now()

    def set_batches(self, descriptions: Sequence[str]) -> None:
        """Set the descriptions of this step's batches (see `describe_batch`)."""
        self.batches = descriptions

    @property
    def is_waiting(self) -> bool:
        """True if this rank has nothing to compute until other ranks have caught up."""
        return self._busy_since is None

    def start_waiting(self) -> None:
        """Mark the point from which this rank may wait for others.

        Only the first call after `begin` or `stop_waiting` has an effect.
        """
        if self._busy_since is not None:
            self._spans.append((self.step, self._busy_since, _now()))
            self._busy_since = None

    def stop_waiting(self) -> None:
        """Mark the end of a wait: this rank computes again."""
        self._busy_since = _now()

    def pop_busy_seconds(self) -> list[float]:
        """Return the busy seconds of each step since the last call; waits for the GPU."""
        spans, self._spans = self._spans, []
        seconds: dict[int, float] = {}
        for step, first, last in spans:
            seconds[step] = seconds.get(step, 0.0) + _seconds(first, last)
        return list(seconds.values())

    def report_progress(self) -> None:
        """Report progress of long work between steps, such as a batch of an evaluation."""
        if self._listener is not None:
            self._listener()

    @contextmanager
    def progress_reported_to(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call `listener` for every `report_progress` in this context."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def __str__(self) -> str:
        return f"step {self.step} ({'; '.join(self.batches)})" if self.batches else f"step {self.step}"


def describe_batch(keys: Sequence[str], ratio: int | None = None) -> str:
    """Return `16x, batch a, b and 13 more` from the keys or paths of its samples and their common ratio."""
    prefix = [f"{ratio}x"] if ratio else []
    return ", ".join([*prefix, f"batch {_abbreviate(keys)}" if keys else "unknown batch"])


def _abbreviate(names: Sequence[str], max_shown: int = 16) -> str:
    """Return `a, b, c and 13 more`."""
    left_out = len(names) - max_shown
    return ", ".join(names[:max_shown]) + (f" and {left_out} more" if left_out > 0 else "")


def _now() -> Any:
    if run_device_type() == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(first: Any, last: Any) -> float:
    if isinstance(first, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1000
