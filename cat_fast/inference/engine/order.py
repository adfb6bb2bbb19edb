"""Order in which requests get a place in the next step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Waiting(Protocol):
    """A request as seen by an order."""

    @property
    def number(self) -> int:
        """Position in the order of arrival."""
        ...

    @property
    def priority(self) -> int: ...

    @property
    def arrived(self) -> float: ...

    @property
    def remaining_seconds(self) -> float:
        """Predicted seconds of its remaining steps on an idle engine."""
        ...

    @property
    def rows(self) -> int:
        """Tokens per step, twins counted."""
        ...

    @property
    def last_step(self) -> int:
        """The engine's last step that included it, or in which it arrived."""
        ...


class Order(Protocol):
    """Order of service."""

    @property
    def patience(self) -> int:
        """Number of consecutive steps without it after which a request goes first."""
        ...

    def key(self, one: Waiting, now: float) -> float:
        """Return the sort key; the smallest goes first."""
        ...


@dataclass(frozen=True)
class FifoPacked:
    """Order of arrival. A request that does not fit the rest of a step does not block those behind it."""

    patience: int = 32

    def key(self, one: Waiting, now: float) -> float:
        return one.number


@dataclass(frozen=True)
class CostAware:
    """Shortest remaining time first, with ageing: remaining seconds - ageing * seconds since arrival.

    Cheap requests are not held up by expensive ones; the longer any waits, the earlier it goes.
    """

    ageing: float = 0.1
    patience: int = 32

    def key(self, one: Waiting, now: float) -> float:
        return one.remaining_seconds - self.ageing * (now - one.arrived)


def select(requests: Sequence[Waiting], order: Order, max_rows: int, step: int, now: float) -> list[int]:
    """Return the indices of the requests that share step number `step`.

    Requests that `patience` steps left out go first, the longest wait first: since each step includes at
    least the first of them, none waits for more than `patience` steps and one per other request. The others
    follow by priority and order. Whatever fits in the rest of the rows is added, so large requests do not
    block small ones. A first request of more than `max_rows` has the step to itself.
    """
    ranked = sorted(range(len(requests)), key=lambda i: _rank(requests[i], order, step, now))
    chosen: list[int] = []
    free = max_rows
    for i in ranked:
        if not chosen or requests[i].rows <= free:
            chosen.append(i)
            free -= requests[i].rows
    return chosen


def _rank(one: Waiting, order: Order, step: int, now: float) -> tuple[int, float, float, int]:
    if step - one.last_step > order.patience:
        return 0, one.last_step, 0.0, one.number
    return 1, -one.priority, order.key(one, now), one.number
