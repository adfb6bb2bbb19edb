"""Decisions before work starts: does a request fit, when will it finish, at which ratio is it drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

from cat_fast.errors import UserError
from cat_fast.generator.sampling import SampleRequest
from cat_fast.inference.engine.cost import Cost, CostModel
from cat_fast.inference.engine.entry import Entry
from cat_fast.inference.engine.errors import DeadlineUnreachable
from cat_fast.inference.engine.forecast import Work, completions, finish_seconds
from cat_fast.inference.engine.order import Order
from cat_fast.inference.engine.request import EngineRequest
from cat_fast.inference.engine.statistics import EngineStatistics

_LAST = 2**62
"""Number of the first request that has not been submitted."""


class Forecast(NamedTuple):
    """Predicted time to completion of a request."""

    seconds: float
    correction: float = 1.0
    """Factor of `seconds` by which recent requests took longer than their forecasts."""


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """The engine at the time of a decision."""

    entries: Sequence[Entry]
    max_rows: int
    """Present row budget of a step: lower than the engine's after a step ran out of memory."""
    decoding_seconds: float
    """Predicted seconds until the decoder is idle."""
    decoded: Sequence[float]
    """Predicted seconds until each image in the decoder is complete, ascending."""
    now: float


class Checked(NamedTuple):
    """A request that the engine can draw, with the cost of each of its variants."""

    variants: tuple[EngineRequest, ...]
    costs: Sequence[Cost]

    @property
    def request(self) -> EngineRequest:
        return self.variants[0]


@dataclass(frozen=True)
class _Candidate:
    """A request that has not been submitted; see `order.Waiting`."""

    priority: int
    arrived: float
    remaining_seconds: float
    work: Work
    number: int

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
        coarser_after: see `PackedEngine`.
    """

    def __init__(
        self,
        cost: CostModel,
        statistics: EngineStatistics,
        order: Order,
        coarser_after: float | None,
    ) -> None:
        self._cost, self._statistics, self._order = cost, statistics, order
        self.coarser_after = coarser_after

    def choose(self, group: Sequence[Checked], in_flight: InFlight) -> list[tuple[int, Forecast | None]]:
        """Return which variant of each request is drawn, and its forecast; None without calibration.

        All requests of a group are forecast together. One that would wait longer than its patience, or miss
        its deadline, moves to the next coarser variant. If a deadline is still missed, the others move too.

        Raises:
            UserError: deadlines and coarser ratios under load need calibration.
            DeadlineUnreachable: a deadline would be missed even with the coarsest variants; with the time of
                the last request that has a deadline.
        """
        if not self._cost.calibrated:
            self._require_no_forecast([one.request for one in group])
            return [(0, None)] * len(group)
        chosen = [0] * len(group)
        deadlines = [one.request.deadline for one in group]
        while True:
            drawn = [(one.variants[i], one.costs[i]) for one, i in zip(group, chosen, strict=True)]
            forecasts = self._forecasts(drawn, in_flight)
            missed = [
                deadline is not None and forecast.seconds > deadline
                for deadline, forecast in zip(deadlines, forecasts, strict=True)
            ]
            coarser = [n for n, one in enumerate(group) if chosen[n] + 1 < len(one.variants)]
            late = [
                n for n in coarser if missed[n] or self._waits_too_long(group[n], drawn[n][1], forecasts[n])
            ]
            moved = late or (coarser if any(missed) else [])
            if not moved:
                break
            for n in moved:
                chosen[n] += 1
        if any(missed):
            required = [
                (d, found.seconds) for d, found in zip(deadlines, forecasts, strict=True) if d is not None
            ]
            raise DeadlineUnreachable(
                min(deadline for deadline, seconds in required if seconds > deadline),
                max(seconds for _, seconds in required),
            )
        return list(zip(chosen, forecasts, strict=True))

    def forecast(self, request: EngineRequest, cost: Cost, in_flight: InFlight) -> Forecast:
        """Predict the time until a request would be complete if it were submitted now."""
        return self._forecasts([(request, cost)], in_flight)[0]

    def room_seconds(self, places: int, in_flight: InFlight) -> float:
        """Predict the time until this many of the unfinished requests are complete."""
        denoised = completions(
            [one.work for one in self._ranked(in_flight.entries, in_flight.now)],
            in_flight.max_rows,
            self._cost.step_seconds,
            in_flight.decoding_seconds,
        )
        ends = chain(in_flight.decoded, (seconds for _, seconds in denoised))
        return max(islice(ends, places), default=0.0) * self._statistics.load_correction

    def _require_no_forecast(self, requests: Sequence[EngineRequest]) -> None:
        under_load = self.coarser_after is not None
        if any(one.deadline is not None or (one.coarser and under_load) for one in requests):
            raise UserError("deadlines and coarser ratios under load need a calibrated engine: calibrate()")

    def _waits_too_long(self, one: Checked, cost: Cost, forecast: Forecast) -> bool:
        if self.coarser_after is None:
            return False
        return forecast.seconds - cost.seconds > self.coarser_after * one.request.complexity

    def _ranked(self, waiting: Sequence[Entry | _Candidate], now: float) -> list[Entry | _Candidate]:
        """Return requests in order of service."""
        return sorted(waiting, key=lambda one: (-one.priority, self._order.key(one, now), one.number))

    def _forecasts(self, new: Sequence[tuple[EngineRequest, Cost]], in_flight: InFlight) -> list[Forecast]:
        """Predict the times until new requests would be complete if they were submitted together."""
        if len(new) == 1 and not in_flight.entries and not in_flight.decoding_seconds:
            return [Forecast(cost.seconds) for _, cost in new]
        candidates: list[Entry | _Candidate] = []
        for n, (request, cost) in enumerate(new):
            denoising = cost.step_seconds * request.num_inference_steps
            rows = request.passes * request.sample.num_tokens
            work = Work(request.num_inference_steps, rows, cost.step_flops, cost.seconds - denoising)
            candidates.append(_Candidate(request.priority, in_flight.now, denoising, work, _LAST + n))
        ranked = self._ranked([*in_flight.entries, *candidates], in_flight.now)
        place = {one.number: i for i, one in enumerate(ranked)}
        seconds = finish_seconds(
            [one.work for one in ranked],
            [place[one.number] for one in candidates],
            in_flight.max_rows,
            self._cost.step_seconds,
            in_flight.decoding_seconds,
        )
        correction = self._statistics.load_correction
        return [Forecast(one * correction, correction) for one in seconds]


def check_room(requests: Sequence[SampleRequest], passes: Sequence[int], max_tokens: int) -> None:
    """Raise UserError if an image exceeds `max_tokens`.

    Args:
        passes: sequences per step of each image: 2 with its unconditional copy for guidance, else 1.
    """
    rows = [number * request.num_tokens for number, request in zip(passes, requests, strict=True)]
    needed = max(rows, default=0)
    if needed > max_tokens:
        largest = rows.index(needed)
        request = requests[largest]
        guided = f", {needed} with the unconditional copy for guidance" if passes[largest] == 2 else ""
        raise UserError(
            f"max_tokens {max_tokens} is too small: image {largest} at {request.ratio}x has"
            f" {request.num_tokens} tokens{guided}; raise it to at least {needed}, or choose a smaller size"
            " or a coarser ratio"
        )
