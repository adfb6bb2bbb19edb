"""The time of a run, which passes only while stages run."""

from collections.abc import Callable


class Clock:
    """Time of a run: measured while stages run, skipped while there is nothing to do.

    Args:
        measure: returns the real time; None for a simulation, whose stages call `advance`.
    """

    def __init__(self, measure: Callable[[], float] | None) -> None:
        self._measure = measure
        self._now = 0.0
        self._since: float | None = None

    def now(self) -> float:
        if self._measure is not None and self._since is not None:
            return self._now + self._measure() - self._since
        return self._now

    def advance(self, seconds: float) -> None:
        """Let simulated time pass."""
        self._now += seconds

    def advance_to(self, time: float) -> None:
        """Skip to an event."""
        self._now = max(self._now, time)

    def running(self) -> "Clock":
        return self

    def __enter__(self) -> "Clock":
        if self._measure is not None:
            self._since = self._measure()
        return self

    def __exit__(self, *_: object) -> None:
        if self._measure is not None and self._since is not None:
            self._now += self._measure() - self._since
            self._since = None
