"""Continuous batching of mixed tokens, steps and guidance: the engine against three schedulers.

    python -m benchmarks.serving --json FILE               two hours on two cores
    python -m benchmarks.serving --quick                   two minutes, rough
    python -m benchmarks.serving --simulate --json FILE    a queue model, seconds

DiT-S at 256 px (256, 64 or 16 tokens), shares 6 / 49 / 45 %, steps from {5, 10, 25, 50}, guidance from
{1, 1.5, 4}, Poisson arrivals. Time is measured while stages run and skipped while nothing is in flight. Loads
are multiples of the capacity, the images per second at the FLOP bound: all passes of the transformer at the
rate of the best step size, and the decoder. Matrix products run on the library that `cat-fast serve` selects.

FILE is written after each load, and lists the missing ones. An interrupted run that is repeated on the same
machine, at the same commit, measures only those.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shared import machine
from benchmarks.shared.mixes import IMAGENET
from benchmarks.shared.program import why_not_resumed
from benchmarks.shared.serving_baselines import (
    Clock,
    DeficitRoundRobin,
    DynamicBatching,
    FifoStepBatching,
    Policy,
    run,
)
from benchmarks.shared.simulated_stages import SimulatedStages
from cat_fast import console
from cat_fast.config import read_yaml
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.errors import UserError
from cat_fast.generator import DiT, SampleRequest, paper_schedule
from cat_fast.generator.flops import forward_flops
from cat_fast.inference import CATPipeline
from cat_fast.inference.engine import CostAware, EngineRequest, FifoPacked, PackedEngine, RequestHandle
from cat_fast.inference.engine.cost import CostModel, median_seconds
from cat_fast.inference.engine.order import Order
from cat_fast.inference.engine.stages import Stages
from cat_fast.kernels.linear.op import resolve, selected, using
from cat_fast.models.build import build_model
from cat_fast.processes.signals import run_command
from cat_fast.tokenizer import NestedAutoencoderKL

CONFIGS = Path(__file__).parents[1] / "configs"
RESOLUTION = 256
BUDGETS = (256, 512, 1024, 2048)
WAITS = (0.0, 0.5, 2.0)
"""Fractions of the mean time alone that dynamic batching waits for further requests."""
SATURATED_ROWS = 1000
"""Rows at which the simulated hardware saturates; the CPU saturates at fewer."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Distribution of requests."""

    grids: Mapping[tuple[int, int], float]
    """(ratio, side of the grid in tokens): share."""
    steps: tuple[int, ...]
    """One per grid, or the choices of all if `steps_by_grid` is False."""
    guidance: tuple[float, ...]
    steps_by_grid: bool = False


MIXES = {
    "cat": Mix(
        grids={(ratio, RESOLUTION // 2 // ratio): share for ratio, share in IMAGENET.items()},
        steps=(5, 10, 25, 50),
        guidance=(1.0, 1.5, 4.0),
    ),
    # shares and steps of vLLM-Omni's Dataset C; tokens 1 : 2.25 : 4 : 9
    "dataset_c": Mix(
        grids={(32, 4): 0.15, (16, 6): 0.25, (16, 8): 0.45, (8, 12): 0.15},
        steps=(20, 20, 25, 35),
        guidance=(1.5,),
        steps_by_grid=True,
    ),
}
BASELINES = ("dynamic_batching", "fifo_step_batching", "deficit_round_robin")
LOADS = {"cat": (0.5, 0.8, 1.0, 2.0), "dataset_c": (0.8,)}


def draw_requests(mix: Mix, count: int, seed: int) -> list[EngineRequest]:
    """Draw requests of a mix."""
    rng = np.random.default_rng(seed)
    grids = list(mix.grids)
    found = []
    for number, at in enumerate(rng.choice(len(grids), count, p=list(mix.grids.values()))):
        ratio, side = grids[at]
        steps = mix.steps[at] if mix.steps_by_grid else int(rng.choice(mix.steps))
        found.append(
            EngineRequest(
                sample=SampleRequest(label=number % 1000, ratio=ratio, grid=(side, side), seed=number),
                num_inference_steps=steps,
                guidance_scale=float(rng.choice(mix.guidance)),
                scheduler="ddim",
            )
        )
    return found


def poisson(
    requests: Sequence[EngineRequest], per_second: float, seed: int
) -> list[tuple[float, EngineRequest]]:
    """Return requests with their times of arrival."""
    times = np.random.default_rng(seed).exponential(1 / per_second, len(requests)).cumsum()
    return list(zip(times.tolist(), requests, strict=True))


def untrained_pipeline() -> CATPipeline:
    """Return DiT-S and the nano tokenizer at 256 px, with random weights."""
    torch.manual_seed(0)
    tokenizer = build_model(NestedAutoencoderKL, read_yaml(CONFIGS / "tokenizer/nano_corpus.yaml")["model"])
    arguments = {"in_channels": 16, "hidden_size": 384, "depth": 12, "num_heads": 6, "position_frame": 16}
    transformer = DiT(**arguments)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return CATPipeline(tokenizer, transformer, paper_schedule(), resolution=RESOLUTION)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A machine or its model, and its capacity."""

    make_stages: Callable[[Clock, int], Stages]
    """Stages on a clock, filled up to multiples of some rows."""
    measure: Callable[[], float] | None
    pipeline: Any
    flops_per_second: float
    cost: CostModel
    """Predicts the engine's seconds."""
    decoding: Mapping[tuple[int, tuple[int, int]], float]
    """Seconds of the decoder per image, by ratio and grid."""

    def flops(self, request: EngineRequest) -> int:
        """Return the FLOPs of all steps of a request."""
        per_pass = forward_flops(self.pipeline.transformer).of(request.sample.num_tokens)
        return per_pass * request.passes * request.num_inference_steps

    def least_seconds(self, request: EngineRequest) -> float:
        """Return the seconds of a request at the FLOP bound."""
        decoding = self.decoding.get((request.sample.ratio, request.sample.grid), 0.0)
        return self.flops(request) / self.flops_per_second + decoding

    def capacity(self, requests: Sequence[EngineRequest]) -> float:
        """Return the images per second at the FLOP bound."""
        return 1 / statistics.mean(map(self.least_seconds, requests))


Arrivals = Sequence[tuple[float, EngineRequest]]
Outcome = tuple[list[float], list[float], dict[str, float]]
"""Seconds of each request, time of the end of each, and totals."""


Serve = Callable[[Bench, Arrivals], Outcome]


def serve_baseline(make: Callable[[], Policy]) -> Serve:
    """Return a function that serves arrivals with a policy of `serving_baselines`."""

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


def columns(
    bench: Bench, arrivals: Arrivals, outcome: Outcome, alone: Mapping[Any, float]
) -> dict[str, float]:
    """Return the columns of one run."""
    times, ends, totals = outcome
    requests = [request for _, request in arrivals]
    slow = [t / alone[_kind(request)] for t, request in zip(times, requests, strict=True)]
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


def _kind(request: EngineRequest) -> tuple[Any, ...]:
    return request.sample.grid, request.num_inference_steps, request.passes


def time_alone(bench: Bench, requests: Sequence[EngineRequest]) -> tuple[dict[Any, float], float]:
    """Return the seconds of each kind of request on an idle engine, and the median error of predictions."""
    found: dict[Any, float] = {}
    errors = []
    for request in requests:
        if _kind(request) not in found:
            (seconds,), _, totals = serve_engine(max(BUDGETS), FifoPacked())(bench, [(0.0, request)])
            found[_kind(request)] = seconds
            errors.append(totals["prediction_error_alone"])
    return found, statistics.median(errors)


def decoding_times(pipeline: CATPipeline, repeats: int) -> dict[tuple[int, tuple[int, int]], float]:
    """Measure the decoder on an image of each ratio and grid of `MIXES`."""
    stages = Stages(pipeline)
    found = {}
    for ratio, side in {grid for mix in MIXES.values() for grid in mix.grids}:
        request = EngineRequest(sample=SampleRequest(label=0, ratio=ratio, grid=(side, side), seed=0))
        latent = stages.latent(stages.prepare(request))
        stages.decode([latent], ratio)  # warm-up
        found[ratio, (side, side)] = median_seconds(partial(stages.decode, [latent], ratio), repeats)
    return found


def rates(pipeline: CATPipeline, repeats: int) -> dict[str, Any]:
    """Measure rows per second against rows per step, and where co-batching stops paying."""
    stages = Stages(pipeline)
    flops = forward_flops(pipeline.transformer)
    points = []
    for rows in (16, 32, 64, 128, 256, 512, 1024, 2048):
        count = max(1, rows // 64)
        side = 8 if rows >= 64 else 4
        requests = [
            EngineRequest(
                sample=SampleRequest(label=0, ratio=16, grid=(side, rows // count // side), seed=i),
                guidance_scale=1.0,
            )
            for i in range(count)
        ]
        states = [stages.prepare(request) for request in requests]
        stages.denoise_step(states)
        seconds = median_seconds(partial(stages.denoise_step, states), repeats)
        total = sum(flops.of(state.request.num_tokens) for state in states)
        points.append(
            {
                "rows": rows,
                "seconds": seconds,
                "rows_per_second": rows / seconds,
                "flops_per_second": total / seconds,
            }
        )
    best = max(point["flops_per_second"] for point in points)
    saturated = next(point["rows"] for point in points if point["flops_per_second"] >= 0.95 * best)
    return {"points": points, "flops_per_second": best, "co_batching_stops_paying_at_rows": saturated}


def calibrated(pipeline: CATPipeline) -> CostModel:
    """Return a cost model measured on packs of 16 to 1,024 rows."""
    cost = CostModel(Stages(pipeline))
    packs = []
    for counts in ({4: 1}, {4: 2, 8: 1}, {4: 4, 8: 3}, {4: 8, 8: 6, 16: 2}):
        packs.append(
            [
                EngineRequest(
                    sample=SampleRequest(label=0, ratio=128 // side, grid=(side, side), seed=seed),
                    guidance_scale=1.0,
                )
                for side, count in counts.items()
                for seed in range(count)
            ]
        )
    cost.calibrate(packs)
    return cost


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to serve, at a row budget and a waiting time in seconds."""

    serve: Callable[[int, float], Serve]
    budgets: Sequence[int] = BUDGETS
    waits: Sequence[float] = (0.0,)


def contestants(requests: Sequence[EngineRequest], alone: Mapping[Any, float]) -> dict[str, Contestant]:
    """Return the contestants by name, with the settings that are tried."""
    mean = statistics.mean(alone[_kind(request)] for request in requests)
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


def measure(
    bench: Bench, mix: str, load: float, *, count: int, rounds: int, sweep_count: int
) -> dict[str, Any]:
    """Tune every contestant, then measure all of them in alternating rounds, the engine twice (A/A)."""
    requests = draw_requests(MIXES[mix], count, seed=1)
    alone, error_alone = time_alone(bench, requests)
    per_second = load * bench.capacity(requests)
    tuning = poisson(requests[:sweep_count], per_second, seed=2)
    # throughput decides above capacity, the share within three times alone below it
    goal = "images_per_second" if load > 1 else "within_three_times_alone"
    kept: dict[str, tuple[str, Serve]] = {}
    sweep: dict[str, dict[str, dict[str, float]]] = {}
    for name, contestant in contestants(requests, alone).items():
        setting, serve, sweep[name] = tune(
            contestant, lambda serve: columns(bench, tuning, serve(bench, tuning), alone), goal
        )
        kept[name] = setting, serve
        _progress(f"{mix} {load:g}x {name}: {setting}")
    kept["engine_again"] = kept["engine"]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in kept}
    for number in range(rounds):
        arrivals = poisson(requests, per_second, seed=10 + number)
        names = list(kept) if number % 2 == 0 else list(kept)[::-1]
        for name in names:
            runs[name].append(columns(bench, arrivals, kept[name][1](bench, arrivals), alone))
            shown = runs[name][-1]
            _progress(
                f"{mix} {load:g}x round {number + 1} {name}: {shown['images_per_second']:.3g} images/s,"
                f" p50 {shown['p50']:.3g} s, p95 {shown['p95']:.3g} s,"
                f" within 3x {shown['within_three_times_alone']:.0%}"
            )
    medians = {
        name: {key: statistics.median(one[key] for one in found if key in one) for key in found[0]}
        for name, found in runs.items()
    }
    medians["engine"]["prediction_error_alone"] = error_alone
    return {
        "load": load,
        "requests": count,
        "capacity_images_per_second": bench.capacity(requests),
        "settings": {name: setting for name, (setting, _) in kept.items()},
        "median": medians,
        "runs": runs,
        "sweep": sweep,
        "goals": goals(medians, load, predicted=bench.measure is None),
    }


def goals(
    median: Mapping[str, Mapping[str, float]], load: float, *, predicted: bool
) -> dict[str, dict[str, Any]]:
    """Return the goals of a load with the values reached.

    `predicted` goals of throughput are those of hardware that saturates at 1,000 rows. On a CPU, every
    schedule that always works ends at the FLOP bound.
    """
    ours, a, b, c = (median[name] for name in ("engine", *BASELINES))
    noise = abs(median["engine_again"]["images_per_second"] / ours["images_per_second"] - 1)

    def ratio(column: str, other: Mapping[str, float]) -> float:
        return ours[column] / other[column] if other[column] else float("inf")

    found: dict[str, tuple[float, float, bool]] = {}
    if load >= 2:
        least = (1.1, 2.0, 1.3) if predicted else (1 - noise, 1.03, 1 - noise)
        for name, other, goal in zip(BASELINES, (a, b, c), least, strict=True):
            value = ratio("images_per_second", other)
            found[f"throughput over {name}"] = (value, goal, value >= goal)
        found["share of the FLOP bound"] = (ours["of_flop_bound"], 0.9, ours["of_flop_bound"] >= 0.9)
        found["fill while requests wait"] = (ours["fill_waiting"], 0.9, ours["fill_waiting"] >= 0.9)
    if load == 0.8:
        for name, other, goal in zip(BASELINES, (a, b, c), (1.5, 1.5, 1.15), strict=True):
            value = ratio("within_three_times_alone", other)
            found[f"share within three times alone over {name}"] = (value, goal, value >= goal)
        for column in ("p50", "p95"):
            for name, other in (("dynamic_batching", a), ("fifo_step_batching", b)):
                value = ratio(column, other)
                found[f"{column} over {name}"] = (value, 0.6, value <= 0.6)
        value = median["engine_fifo_packed"]["p99"] / b["p99"]
        found["p99 of the FIFO order over fifo_step_batching"] = (value, 1.0, value <= 1.0)
        if not predicted:
            for column, goal in (("prediction_error_alone", 0.1), ("prediction_error_shared", 0.25)):
                found[column] = (ours[column], goal, ours[column] <= goal)
    if not predicted:  # simulated time passes in steps only
        found["overhead"] = (ours["overhead"], 0.05, ours["overhead"] < 0.05)
    return {name: {"value": value, "goal": goal, "met": met} for name, (value, goal, met) in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Benchmark of serving: the engine against other schedulers.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument(
        "--quick", action="store_true", help="12 requests at one load, no sweep worth the name"
    )
    parser.add_argument(
        "--simulate", action="store_true", help="a queue model of hardware that saturates at 1,000 rows"
    )
    parser.add_argument("--threads", type=int, help="threads of torch")
    given = parser.parse_args(arguments)
    try:
        if given.json is not None:
            require_writable(given.json)
        if given.threads:
            torch.set_num_threads(given.threads)
        with using(resolve("auto")):
            _measure_all(given)
    except UserError as error:
        console.print_error(error)
        return 2
    return 0


def _measure_all(given: argparse.Namespace) -> None:
    about = {
        "benchmark": "serving",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **machine.describe(),
        "linear_backend": selected(),
        "load_before": os.getloadavg()[0],
    }
    pipeline = untrained_pipeline()
    if given.simulate:
        rate = 1e14
        full_step = SATURATED_ROWS * forward_flops(pipeline.transformer).of(64) / 64
        cost = CostModel(Stages(pipeline))
        cost.assume(rate, full_step)
        bench = Bench(
            make_stages=lambda clock, rows: SimulatedStages(pipeline, clock, rate, full_step),
            measure=None,
            pipeline=pipeline,
            flops_per_second=rate,
            cost=cost,
            decoding={},
        )
        curve: dict[str, Any] = {"model": f"seconds = max(FLOPs, those of {SATURATED_ROWS} rows) / rate"}
        effort = {"count": 400, "rounds": 3, "sweep_count": 200}
    else:
        curve = rates(pipeline, 3 if given.quick else 9)
        _progress(f"co-batching stops paying at {curve['co_batching_stops_paying_at_rows']} rows")
        bench = Bench(
            make_stages=lambda clock, rows: Stages(pipeline, rows=rows),
            measure=time.perf_counter,
            pipeline=pipeline,
            flops_per_second=curve["flops_per_second"],
            cost=calibrated(pipeline),
            decoding=decoding_times(pipeline, 3 if given.quick else 9),
        )
        # a queue grows, and shares differ by more than noise, only with enough requests
        effort = {"count": 100, "rounds": 3, "sweep_count": 50}
    loads = LOADS
    if given.quick:
        effort, loads = {"count": 12, "rounds": 1, "sweep_count": 4}, {"cat": (2.0,)}
    results = {
        "about": about,
        "kind": "predicted" if given.simulate else "measured",
        "effort": effort,
        "curve": curve,
        "decoding_seconds": {
            f"{ratio}x, {h} x {w} tokens": value for (ratio, (h, w)), value in bench.decoding.items()
        },
    }
    mixes = {} if given.json is None else loads_of(given.json, results)
    wanted = [(mix, load) for mix, of_mix in loads.items() for load in of_mix]
    for mix, load in wanted:
        if f"{load:g}" in mixes.setdefault(mix, {}):
            _progress(f"{mix} {load:g}x: kept from {given.json}")
            continue
        mixes[mix][f"{load:g}"] = measure(bench, mix, load, **effort)
        if given.json is not None:
            left = [f"{mix} {load:g}x" for mix, load in wanted if f"{load:g}" not in mixes.get(mix, {})]
            described = about | {"load_after": os.getloadavg()[0]} | ({"missing": left} if left else {})
            write_results(given.json, results | {"about": described, "mixes": mixes})


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results atomically, with floats of four digits."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(_rounded(dict(results)), indent=1, allow_nan=False) + "\n")


def loads_of(file: Path, results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the loads by mix in an unfinished file of the same machine, commit and effort."""
    before = json.loads(file.read_text()) if file.is_file() and file.stat().st_size else {}
    if not before.get("about", {}).get("missing"):
        return {}
    same = {key: results["about"][key] for key in ("python", "packages", "cpu", "linear_backend", "commit")}
    reason = why_not_resumed(before, same)
    if reason is None and any(before.get(key) != results[key] for key in ("effort", "kind")):
        reason = "measured with another effort"
    if reason:
        _progress(f"{file}: {reason}; measured again")
    return {} if reason else before["mixes"]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _progress(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
