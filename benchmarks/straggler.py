"""Waiting time of ranks for the slowest one, when each trains at the ratio of its images.

    python -m benchmarks.straggler --json FILE [--table FILE] [--quick]

Steps of 8, 64 and 1024 ranks are simulated from a cost table, either given or first measured on this machine
with the paper's widths and batches, and a smaller image. `balanced` plans with the fitted costs of the table;
a simulated step takes the time that was measured, so that errors of the fit make ranks wait. Keys are
<mode>.<ranks>[.jitter].wait: the share of all ranks' time spent waiting, under `sampler.mode: per_rank` and
`balanced` with the mix below. `jitter` adds random noise to every rank's step, which makes ranks wait under
any plan; `equal` shows its effect alone. GPUs and communication are not simulated. Takes about eight minutes
on two cores.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster.model import slowest_of
from benchmarks.shared.configs import tokenizer_run
from benchmarks.shared.mixes import TOKENIZER_TRAINING
from benchmarks.shared.simple_program import about
from cat_fast import console
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.data.sampling.balanced_plan import BalancedPlan
from cat_fast.data.sampling.cost_table import CostTable
from cat_fast.data.sampling.step_plan import PerRankPlan, StepPlan
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

MIX = TOKENIZER_TRAINING
BATCH_SIZE = 8
"""Images per rank, as in the paper."""
WORLD_SIZES = (8, 64, 1024)
JITTER = 0.05
"""Standard deviation of a rank's step time, relative to the step time."""
TARGET = 0.03
"""Upper limit of the waiting share for `balanced`, without jitter."""


def step_cost(costs: CostTable, ratio: int, images: int) -> float:
    """Return the cost of a rank's step as measured, interpolated between the measured batches.

    Beyond them, each image adds the cost of the table's fit. Without measurements it is the fitted cost.
    """
    own = sorted((one.images, one.seconds) for one in costs.measured if one.ratio == ratio)
    if not own:
        return costs.costs[ratio](images)
    measured, seconds = zip(*own, strict=True)
    beyond = images - min(max(images, measured[0]), measured[-1])
    return float(np.interp(images, measured, seconds)) + costs.costs[ratio].per_image * beyond


def simulate(
    plan: StepPlan, costs: CostTable, steps: int, jitter: float = 0.0, seed: int = 0
) -> dict[str, float]:
    """Return the share of waiting over `steps` steps, and the sizes of the batches."""
    noise = np.random.default_rng(seed)
    cost = cache(partial(step_cost, costs))
    drawn: Counter[int] = Counter()
    busy, total, batches = 0.0, 0.0, []
    for step in range(steps):
        parts = plan.plan(step, drawn)
        seconds = np.array([cost(part.ratio, part.images) for part in parts], dtype=float)
        seconds *= np.maximum(0.0, 1 + jitter * noise.standard_normal(len(parts)))
        busy += seconds.sum()
        total += seconds.max() * len(parts)
        for part in parts:
            drawn[part.ratio] += part.images
        batches.append(sum(part.images for part in parts))
    images = sum(batches)
    return {
        "wait": 1 - busy / total,
        "images_per_second_per_rank": images / total,
        "min_batch": min(batches),
        "mean_batch": images / steps,
        "max_batch": max(batches),
        **{f"share_{f}x": drawn[f] / images for f in MIX},
    }


def expected_wait(costs: CostTable, batch_size: int, ranks: int) -> float:
    """Return the waiting share of `per_rank`: 1 - E[cost] / E[maximum of `ranks` independent draws]."""
    at_ratio = {f: step_cost(costs, f, batch_size) for f in MIX}
    return 1 - slowest_of(at_ratio, MIX, 1) / slowest_of(at_ratio, MIX, ranks)


def results(costs: CostTable, batch_size: int, steps: int) -> dict[str, dict[str, Any]]:
    """Return every row by key. `steps` applies to the smallest world size; larger ones need fewer."""
    rows: dict[str, dict[str, Any]] = {}
    for ranks in WORLD_SIZES:
        many = max(50, steps * WORLD_SIZES[0] // ranks)
        per_rank = PerRankPlan(MIX, batch_size, ranks, seed=0)
        balanced = BalancedPlan(MIX, batch_size, ranks, 0, costs)
        equal = PerRankPlan({16: 1.0}, batch_size, ranks, seed=0)
        rows[f"per_rank.{ranks}"] = simulate(per_rank, costs, many)
        rows[f"per_rank.{ranks}"]["expected_wait"] = expected_wait(costs, batch_size, ranks)
        rows[f"balanced.{ranks}"] = simulate(balanced, costs, many)
        rows[f"per_rank.{ranks}.jitter"] = simulate(per_rank, costs, many, JITTER)
        rows[f"balanced.{ranks}.jitter"] = simulate(balanced, costs, many, JITTER)
        rows[f"equal.{ranks}.jitter"] = simulate(equal, costs, many, JITTER)
    return rows


def measure_costs(quick: bool) -> CostTable:
    """Measure the paper's configuration with smaller images on this machine."""
    from cat_fast.training.tokenizer.measure_cost import measure, num_timed_steps

    side, batches, repeats = (64, (1, 4), 2) if quick else (128, (4, 8), 3)
    config = tokenizer_run("cat_c16", [f"data.image_size={side}"])
    with console.progress("steps") as bar:
        task = bar.add_task("measuring", total=num_timed_steps(config, batches, repeats))
        return measure(
            config,
            batches,
            repeats,
            on_step=lambda name: bar.update(task, advance=1, description=name),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, simulate, print, write JSON. Return 1 if `balanced` waits too long, 2 for invalid usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="cost table written by cat-fast plan cost")
    parser.add_argument(
        "--quick", action="store_true", help="small images, few steps: a rough answer quickly"
    )
    given = parser.parse_args(arguments)
    try:
        if given.json is not None:
            require_writable(given.json)
        load = os.getloadavg()[0]
        costs = CostTable.read(given.table) if given.table else measure_costs(given.quick)
        costs.require(list(MIX))
        rows = results(costs, BATCH_SIZE, 400 if given.quick else 10_000)
    except UserError as error:
        console.print_error(error)
        return 2
    for key, row in rows.items():
        print(line(key, row), flush=True)
    if given.json is not None:
        report = as_json(costs, rows, about("straggler", load, quick=given.quick))
        with atomic_write(given.json) as path:
            path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    late = [ranks for ranks in WORLD_SIZES if rows[f"balanced.{ranks}"]["wait"] >= TARGET]
    return 1 if late else 0


def as_json(
    costs: CostTable, rows: Mapping[str, Mapping[str, Any]], described: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the file's contents: shares of waiting first, then the rows, the cost table and the machine."""
    return {
        **{f"{key}.wait": round(row["wait"], 5) for key, row in rows.items()},
        "cases": rows,
        "simulated": {"mix": MIX, "batch_size": BATCH_SIZE, "jitter": JITTER},
        "costs": {
            "unit": costs.unit,
            "by_ratio": {f: asdict(cost) for f, cost in costs.costs.items()},
            "fit_error": costs.fit_error,
            "measured": [asdict(one) for one in costs.measured],
            "about": dict(costs.about),
        },
        "about": dict(described),
    }


def line(key: str, row: Mapping[str, Any]) -> str:
    """Format a row as text."""
    batches = f"{row['min_batch']} to {row['max_batch']} images per step"
    return f"{key:<24} ranks wait {row['wait']:>6.1%} of the time   {batches}"


if __name__ == "__main__":
    sys.exit(run_command(main))
