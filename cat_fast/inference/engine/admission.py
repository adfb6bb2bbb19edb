"""Decisions before work starts: does a request fit, when will it finish, at which ratio is it drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cat_fast.errors import UserError
from cat_fast.generator.sampling import SampleRequest
from cat_fast.inference.engine.cost import Cost, CostModel
from cat_fast.inference.engine.entry import Entry
from cat_fast.inference.engine.errors import DeadlineUnreachable
from cat_fast.inference.engine.forecast import Work, finish_seconds
from cat_fast.inference.engine.order import Order
from cat_fast.inference.engine.request import EngineRequest
from cat_fast.inference.engine.statistics import EngineStatistics

_LAST = 2**62
"""Number of a request that has not been submitted."""


class Forecast(NamedTuple):
    """Predicted time to completion of a request."""

    seconds: float
    correction: float = 1.0
    """Factor of `seconds` by which recent requests took longer than their forecasts."""


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """The engine at the time of a decision."""

    entries: Sequence[Entry]
    decoding_seconds: float
    """Predicted seconds until the decoder is idle."""
    now: float

    def plus(self, entries: Sequence[Entry]) -> "InFlight":
        """Return the engine with further requests."""
        return replace(self, entries=[*self.entries, *entries])


@dataclass(frozen=True)
class _Candidate:
    """A request that has not been submitted; see `order.Waiting`."""

    priority: int
    arrived: float
    remaining_seconds: float
    work: Work
    number: int = _LAST

    @property
    def rows(self) -> int:
        return self.work.rows

    @property
    def last_step(self) -> int:
        return 0


class Admission:
    """Admission by exact cost.

    Args:
        cost: predicts the seconds of a step.
        statistics: corrects forecasts by those of recent requests.
        order: of service.
        max_tokens: row budget of a step.
        coarser_after: see `PackedEngine`.
    """

    def __init__(
        self,
        cost: CostModel,
        statistics: EngineStatistics,
        order: Order,
        max_tokens: int,
        coarser_after: float | None,
    ) -> None:
        self._cost, self._statistics, self._order = cost, statistics, order
        self._max_tokens, self.coarser_after = max_tokens, coarser_after

    def choose(
        self, variants: Sequence[EngineRequest], costs: Sequence[Cost], in_flight: InFlight
    ) -> tuple[int, Forecast | None]:
        """Return which variant of a request is drawn, and its forecast; None without calibration.

        A coarser one is chosen if a finer one would wait longer than the patience of the request, or miss its
        deadline.
        """
        request = variants[0]
        if not self._cost.calibrated:
            if request.deadline is not None or (request.coarser and self.coarser_after is not None):
                raise UserError(
                    "deadlines and coarser ratios under load need a calibrated engine: calibrate()"
                )
            return 0, None
        patience = None if self.coarser_after is None else self.coarser_after * request.complexity
        found = Forecast(0.0)
        for i, (variant, cost) in enumerate(zip(variants, costs, strict=True)):
            found = self.forecast(variant, cost, in_flight)
            late = patience is not None and found.seconds - cost.seconds > patience
            late |= request.deadline is not None and found.seconds > request.deadline
            if not late:
                return i, found
        return len(variants) - 1, found

    def forecast(self, request: EngineRequest, cost: Cost, in_flight: InFlight) -> Forecast:
        """Predict the time until a request would be complete if it were submitted now."""
        if not in_flight.entries and not in_flight.decoding_seconds:
            return Forecast(cost.seconds)
        denoising = cost.step_seconds * request.num_inference_steps
        rows = request.passes * request.sample.num_tokens
        work = Work(request.num_inference_steps, rows, cost.step_flops, cost.seconds - denoising)
        new = _Candidate(request.priority, in_flight.now, denoising, work)
        return self._finish(new, [*in_flight.entries, new], in_flight)

    def check_deadlines(self, entries: Sequence[Entry], in_flight: InFlight) -> None:
        """Check the deadlines of requests that are submitted together, each delayed by the others.

        Args:
            entries: with the forecasts of `choose`.
            in_flight: the engine without them.

        Raises:
            DeadlineUnreachable: one of them would miss its deadline; with the time of the last of them.
        """
        deadlines = [entry.request.deadline for entry in entries]
        if not any(deadlines):
            return
        if len(entries) == 1:
            seconds = [entries[0].handle.record.predicted_seconds or 0.0]
        else:
            together = [*in_flight.entries, *entries]
            seconds = [self._finish(entry, together, in_flight).seconds for entry in entries]
        missed = [
            deadline
            for deadline, needed in zip(deadlines, seconds, strict=True)
            if deadline is not None and needed > deadline
        ]
        if missed:
            raise DeadlineUnreachable(min(missed), max(seconds))

    def _finish(
        self, one: "Entry | _Candidate", unfinished: Sequence["Entry | _Candidate"], in_flight: InFlight
    ) -> Forecast:
        """Predict the time until `one` of all unfinished requests is complete."""
        ranked = sorted(
            unfinished, key=lambda one: (-one.priority, self._order.key(one, in_flight.now), one.number)
        )
        seconds = finish_seconds(
            [one.work for one in ranked],
            ranked.index(one),
            self._max_tokens,
            self._cost.step_seconds,
            in_flight.decoding_seconds,
        )
        correction = self._statistics.load_correction
        return Forecast(seconds * correction, correction)


def check_room(requests: Sequence[SampleRequest], passes: int, max_tokens: int) -> None:
    """Raise UserError if an image, with its unconditional copy if `passes` is 2, exceeds `max_tokens`."""
    longest = max(range(len(requests)), key=lambda i: requests[i].num_tokens, default=None)
    if longest is None:
        return
    request = requests[longest]
    needed = passes * request.num_tokens
    if needed > max_tokens:
        guided = f", {needed} with the unconditional copy for guidance" if passes == 2 else ""
        raise UserError(
            f"max_tokens {max_tokens} is too small: image {longest} at {request.ratio}x has"
            f" {request.num_tokens} tokens{guided}; raise it to at least {needed}"
        )
