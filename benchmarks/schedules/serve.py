"""Serving arrivals with a policy or with the engine, on the same stages, and the columns of a run."""

import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.schedules.arrivals import Arrivals
from benchmarks.schedules.bench import Bench
from benchmarks.schedules.clock import Clock
from benchmarks.schedules.policies import Job, Policy
from cat_fast.inference.engine import EngineRequest, PackedEngine, RequestHandle
from cat_fast.inference.engine.order import Order
from cat_fast.inference.engine.stages import Stages

Outcome = tuple[list[float], list[float], dict[str, float]]
"""Seconds of each request, time of the end of each, and totals."""
Serve = Callable[[Bench, Arrivals], Outcome]


def serve_baseline(make: Callable[[], Policy]) -> Serve:
    """Return a function that serves arrivals with a policy."""

    def serve(bench: Bench, arrivals: Arrivals) -> Outcome:
        clock = Clock(bench.measure)
        jobs, totals = run(make(), bench.make_stages(clock, 1), arrivals, clock)
        ends = [job.finished or 0.0 for job in jobs]
        waits = float(max(job.longest_wait for job in jobs))
        return (
            [end - job.arrived for end, job in zip(ends, jobs, strict=True)],
            ends,
            totals | {"longest_wait": waits},
        )

    return serve


def serve_engine(max_rows: int, order: Order) -> Serve:
    """Return a function that serves arrivals with the engine."""

    def serve(bench: Bench, arrivals: Arrivals) -> Outcome:
        clock = Clock(bench.measure)
        stages = bench.make_stages(clock, 16)
        engine = PackedEngine(
            bench.pipeline, max_rows, order=order, stages=stages, cost=bench.cost, clock=clock.now
        )
        waiting = list(arrivals)
        handles: list[RequestHandle] = []
        ends: dict[int, float] = {}

        def ended(handle: RequestHandle) -> None:
            ends[handle.id] = clock.now()

        while waiting or engine.unfinished:
            while waiting and waiting[0][0] <= clock.now():
                _, request = waiting.pop(0)
                with clock.running():
                    handles.append(engine.submit(request))
                handles[-1].add_done_callback(ended)
            if not engine.unfinished:
                clock.advance_to(waiting[0][0])
                continue
            with clock.running():
                engine.step()
        times = [ends[handle.id] - arrived for handle, (arrived, _) in zip(handles, arrivals, strict=True)]
        totals = engine.statistics
        longest = max(handle.record.longest_wait_steps for handle in handles)
        return (
            times,
            list(ends.values()),
            {
                "steps": totals.steps,
                "fill": totals.fill,
                "fill_waiting": totals.fill_waiting,
                "overhead": totals.overhead,
                "longest_wait": float(longest),
                **{
                    f"prediction_error_{name}": error
                    for name, is_alone in (("alone", True), ("shared", False))
                    if (error := totals.median_error(alone=is_alone)) is not None
                },
            },
        )

    return serve


def run(
    policy: Policy, stages: Stages, arrivals: Arrivals, clock: Clock
) -> tuple[list[Job], dict[str, float]]:
    """Serve requests with a policy until all are done; return their jobs and the totals of the steps."""
    waiting = deque(Job(request, time) for time, request in arrivals)
    jobs: list[Job] = list(waiting)
    step, rows, budget = 0, 0, 0
    while any(job.finished is None for job in jobs):
        while waiting and waiting[0].arrived <= clock.now():
            job = waiting.popleft()
            job.last_step = step
            policy.arrive(job)
        chosen = list(policy.choose(clock.now()))
        if not chosen:
            events = [policy.wake(clock.now()), waiting[0].arrived if waiting else None]
            clock.advance_to(min(event for event in events if event is not None))
            continue
        step += 1
        rows += sum(job.rows for job in chosen)
        budget += policy.max_rows
        with clock.running():
            for job in chosen:
                job.state = job.state or stages.prepare(job.request)
            predictions = stages.denoise_step([job.state for job in chosen])
            for job, prediction in zip(chosen, predictions, strict=True):
                stages.scheduler_step(job.state, prediction)
                job.steps_done += 1
        for job in jobs[: len(jobs) - len(waiting)]:  # others have arrived during the step
            if job.finished is None:
                job.longest_wait = max(job.longest_wait, step - job.last_step - (job in chosen))
        for job in chosen:
            job.last_step = step
        done = [job for job in chosen if job.steps_done == job.request.num_inference_steps]
        with clock.running():
            for job in done:  # each ends with its own image, as in the engine
                stages.decode([stages.latent(job.state)], job.request.sample.ratio)
                job.finished, job.state = clock.now(), None
    return jobs, {"steps": step, "fill": rows / budget if budget else 0.0}


def columns(
    bench: Bench, arrivals: Arrivals, outcome: Outcome, alone: Mapping[Any, float]
) -> dict[str, float]:
    """Return the columns of one run."""
    times, ends, totals = outcome
    requests = [request for _, request in arrivals]
    slow = [t / alone[kind_of(request)] for t, request in zip(times, requests, strict=True)]
    span = max(ends) - arrivals[0][0]
    p50, p95, p99 = (float(np.percentile(times, q)) for q in (50, 95, 99))
    return {
        "images_per_second": len(times) / span,
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "within_three_times_alone": statistics.mean(one <= 3 for one in slow),
        "of_flop_bound": sum(map(bench.least_seconds, requests)) / span,
        **totals,
    }


def kind_of(request: EngineRequest) -> tuple[Any, ...]:
    return request.sample.grid, request.num_inference_steps, request.passes
