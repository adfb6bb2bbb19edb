"""Continuous batching of mixed tokens, steps and guidance: the engine against three schedulers.

    python -m benchmarks.serving --json FILE               two hours on two cores
    python -m benchmarks.serving --quick                   two minutes, rough
    python -m benchmarks.serving --simulate --json FILE    a queue model, seconds

DiT-S at 256 px (256, 64 or 16 tokens), shares 6 / 49 / 45 %, steps from {5, 10, 25, 50}, guidance from
{1, 1.5, 4}, Poisson arrivals. Time is measured while stages run and skipped while nothing is in flight. Loads
are multiples of the capacity, the images per second at the FLOP bound: all passes of the transformer at the
rate of the best step size, and the decoder. Matrix products run on the library that `cat-fast serve` selects.

FILE is written after each load, and lists the missing ones. An interrupted run that is repeated on the same
machine, at the same commit, measures only those. Exit codes: 0 all goals are reached, 1 some are not, 2 for
invalid usage.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.schedules.arrivals import MIXES, draw_requests, poisson
from benchmarks.schedules.bench import Bench, measured_bench, simulated_bench, untrained_pipeline
from benchmarks.schedules.goals import goals
from benchmarks.schedules.serve import Serve, columns
from benchmarks.schedules.tuning import contestants, time_alone, tune
from benchmarks.shared.compact_json import write_compact
from benchmarks.shared.harness import rounded
from benchmarks.shared.program import why_not_resumed
from benchmarks.shared.simple_program import about
from cat_fast import console
from cat_fast.data.files import require_writable
from cat_fast.errors import UserError
from cat_fast.kernels.linear.op import resolve, selected, using
from cat_fast.processes.signals import run_command

LOADS = {"cat": (0.5, 0.8, 1.0, 2.0), "dataset_c": (0.8,)}
"""Of each mix, as multiples of the capacity."""


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
            missed = unmet(_measure_all(given))
    except UserError as error:
        console.print_error(error)
        return 2
    for goal in missed:
        _progress(f"goal not reached: {goal}")
    return 1 if missed else 0


def _measure_all(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure and write all loads; return them by mix."""
    load_before = os.getloadavg()[0]

    def described() -> dict[str, Any]:
        return about("serving", load_before, quick=given.quick) | {"linear_backend": selected()}

    pipeline = untrained_pipeline()
    repeats = 3 if given.quick else 9
    bench, curve = simulated_bench(pipeline) if given.simulate else measured_bench(pipeline, repeats)
    if "points" in curve:
        _progress(f"co-batching stops paying at {curve['co_batching_stops_paying_at_rows']} rows")
    # a queue grows, and shares differ by more than noise, only with enough requests
    effort = {"count": 400, "sweep_count": 200} if given.simulate else {"count": 100, "sweep_count": 50}
    effort |= {"rounds": 3}
    loads = LOADS
    if given.quick:
        effort, loads = {"count": 12, "rounds": 1, "sweep_count": 4}, {"cat": (2.0,)}
    results = {
        "about": described(),
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
            now = described() | ({"missing": left} if left else {})
            write_results(given.json, results | {"about": now, "mixes": mixes})
    return mixes


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results atomically, with floats of four digits and null for an unlimited ratio."""
    write_compact(path, rounded(results))


def unmet(mixes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the goals that were not reached, with mix and load."""
    return [
        f"{mix} {load}x: {name}"
        for mix, loads in mixes.items()
        for load, found in loads.items()
        for name, goal in found["goals"].items()
        if not goal["met"]
    ]


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


def _progress(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
