"""What a rank is at: told by its task, read by whoever has to name it (guard, watchdog, slow ranks)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Work:
    """The step in hand, its batches, and how much of the step was this rank's own doing.

    A step is its own work from `begin` or `resumed` to the next `computed`: data, and what is computed before
    the rank waits for others. On a GPU the time is the device's, between two events.
    """

    step: int = 0
    parts: Sequence[str] = ()
    """Descriptions of its batches, one per accumulation step."""
    _begun: Any = None
    _spans: list[tuple[int, Any, Any]] = field(default_factory=list)

    def begin(self, step: int) -> None:
        self.step, self.parts = step, ()
        self._begun = _now()

    def on(self, parts: Sequence[str]) -> None:
        """Set the descriptions of this step's batches (`describe_batch`)."""
        self.parts = parts

    @property
    def waiting(self) -> bool:
        """Whether this rank's own part of the step is done, as far as its task tells."""
        return self._begun is None

    def computed(self) -> None:
        """From here on this rank may wait for the others; only the first call since `begin` or `resumed`
        counts."""
        if self._begun is not None:
            self._spans.append((self.step, self._begun, _now()))
            self._begun = None

    def resumed(self) -> None:
        """Return to this rank's own part of the step, after it waited for the others."""
        self._begun = _now()

    def take_own_seconds(self) -> list[float]:
        """Own time of each step since the last call, in seconds; waits for the GPU."""
        spans, self._spans = self._spans, []
        seconds: dict[int, float] = {}
        for step, first, last in spans:
            seconds[step] = seconds.get(step, 0.0) + _seconds(first, last)
        return list(seconds.values())

    def __str__(self) -> str:
        return f"step {self.step} ({'; '.join(self.parts)})" if self.parts else f"step {self.step}"


def describe_batch(keys: Sequence[str], ratio: int | None = None) -> str:
    """Return `16x, batch a, b and 13 more`, from its samples' keys or paths and their common ratio."""
    prefix = [f"{ratio}x"] if ratio else []
    return ", ".join([*prefix, f"batch {shortened(keys)}" if keys else "no batch told"])


def shortened(names: Sequence[str], most: int = 16) -> str:
    """`a, b, c and 13 more`."""
    left_out = len(names) - most
    return ", ".join(names[:most]) + (f" and {left_out} more" if left_out > 0 else "")


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(first: Any, last: Any) -> float:
    if isinstance(first, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1000
