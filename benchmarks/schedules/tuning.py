"""The contestants, and the search for the best row budget and waiting time of each."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.schedules.bench import Bench
from benchmarks.schedules.policies import DeficitRoundRobin, DynamicBatching, FifoStepBatching
from benchmarks.schedules.serve import Serve, kind_of, serve_baseline, serve_engine
from cat_fast.inference.engine import CostAware, EngineRequest, FifoPacked

BUDGETS = (256, 512, 1024, 2048)
WAITS = (0.0, 0.5, 2.0)
"""Fractions of the mean time alone that dynamic batching waits for further requests."""


def time_alone(bench: Bench, requests: Sequence[EngineRequest]) -> tuple[dict[Any, float], float]:
    """Return the seconds of each kind of request on an idle engine, and the median error of predictions."""
    found: dict[Any, float] = {}
    errors = []
    for request in requests:
        if kind_of(request) not in found:
            (seconds,), _, totals = serve_engine(max(BUDGETS), FifoPacked())(bench, [(0.0, request)])
            found[kind_of(request)] = seconds
            errors.append(totals["prediction_error_alone"])
    return found, statistics.median(errors)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to serve, at a row budget and a waiting time in seconds."""

    serve: Callable[[int, float], Serve]
    budgets: Sequence[int] = BUDGETS
    waits: Sequence[float] = (0.0,)


def contestants(requests: Sequence[EngineRequest], alone: Mapping[Any, float]) -> dict[str, Contestant]:
    """Return the contestants by name, with the settings that are tried."""
    mean = statistics.mean(alone[kind_of(request)] for request in requests)
    largest = max(request.passes * request.sample.num_tokens for request in requests)
    budgets = [rows for rows in BUDGETS if rows >= largest]  # the engine never exceeds its budget
    return {
        "dynamic_batching": Contestant(
            serve=lambda rows, wait: serve_baseline(partial(DynamicBatching, rows, wait)),
            waits=[part * mean for part in WAITS],
        ),
        "fifo_step_batching": Contestant(
            serve=lambda rows, _: serve_baseline(partial(FifoStepBatching, rows))
        ),
        "deficit_round_robin": Contestant(
            serve=lambda rows, _: serve_baseline(partial(DeficitRoundRobin, rows))
        ),
        "engine_fifo_packed": Contestant(
            serve=lambda rows, _: serve_engine(rows, FifoPacked()), budgets=budgets
        ),
        "engine": Contestant(serve=lambda rows, _: serve_engine(rows, CostAware()), budgets=budgets),
    }


def tune(
    contestant: Contestant, run: Callable[[Serve], dict[str, float]], goal: str
) -> tuple[str, Serve, dict[str, dict[str, float]]]:
    """Find the best budget without waiting, then the best waiting time at it.

    Returns:
        The setting in words, the function that serves at it, and the columns of all settings tried.
    """
    tried: dict[tuple[int, float], dict[str, float]] = {}

    def best() -> tuple[int, float]:
        return max(tried, key=lambda setting: (tried[setting][goal], -tried[setting]["p95"]))

    for rows in contestant.budgets:
        tried[rows, contestant.waits[0]] = run(contestant.serve(rows, contestant.waits[0]))
    rows = best()[0]
    for wait in contestant.waits[1:]:
        tried[rows, wait] = run(contestant.serve(rows, wait))
    words = {
        setting: f"rows={setting[0]}" + f",wait={setting[1]:.3g}s" * (len(contestant.waits) > 1)
        for setting in tried
    }
    return (
        words[best()],
        contestant.serve(*best()),
        {words[setting]: found for setting, found in tried.items()},
    )
