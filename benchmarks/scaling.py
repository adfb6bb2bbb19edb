"""Simulate the paper's two training runs on 8 to 1024 GPUs: hours, GPU-hours, cost and the best ZeRO stage.

    python -m benchmarks.scaling --json FILE [--table FILE]

Nothing here is measured on a GPU. A rank's computing time is the prediction of `benchmarks.roofline` from
data sheets; links, prices and failures are those of `benchmarks/data/links.json`. The sampler's waits are
those of its plans, `per_rank` and `balanced`; batches of the transformer are packed and hardly wait. Both
runs keep the number of images or tokens of the paper. With more GPUs than its global batch has images, or
tokens for a batch of 4096 per GPU, the global batch grows and the number of steps falls, which is stated.
`--table` replaces the predicted times of the tokenizer by a cost table measured with `cat-fast plan cost`.
`python -m benchmarks.scaling_validation` compares the model with runs on two processes.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.bounds.data_sheets import Assumptions as Shares
from benchmarks.bounds.data_sheets import DataSheet, read_sheets
from benchmarks.cluster.links import Assumptions, Node, read_links
from benchmarks.cluster.model import Failures, Link, communication, slowest_of, waiting_for_data
from benchmarks.shared.harness import rounded
from benchmarks.straggler import simulate
from cat_fast import console
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.data.sampling.balanced_plan import BalancedPlan
from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command
from cat_fast.training.tokenizer.predict_memory import Zero

WORLD_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
STAGES = (1, 2, 3)
SHARES = {8: 0.10, 16: 0.48, 32: 0.42}
"""Mix of the tokenizer's training."""
BUCKET = 50_000_000
"""Elements per bucket in configs/deepspeed."""
CHECKPOINT_STEPS = 5000
RESERVED = 0.1
"""Share of a GPU's memory that is left free."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Costs of one rank's batch on one GPU model."""

    seconds: Mapping[int, Cost]
    """Seconds per step by ratio, affine in the images."""
    parameters: Sequence[int]
    """Trained parameters per engine."""
    activation_bytes: Mapping[int, float]
    """Peak bytes of a step per image, by ratio."""
    layers: int
    """Modules with weights, which ZeRO 3 gathers one by one."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of the paper."""

    name: str
    images: int
    """Global batch of the paper: images, or units of tokens."""
    steps: int
    sampler: str
    """per_rank, balanced or packed."""
    min_images: int
    """Least batch of a rank."""
    loads_images: bool
    """True if images are decoded in training; latents need no decoding."""
    stages: Sequence[int] = STAGES


RUNS = (
    Run(
        name="tokenizer",
        images=512,
        steps=1_000_000,
        sampler="per_rank",
        min_images=1,
        loads_images=True,
        stages=(1, 2),  # a GAN does not train under ZeRO 3
    ),
    Run(
        name="tokenizer, balanced",
        images=512,
        steps=1_000_000,
        sampler="balanced",
        min_images=1,
        loads_images=True,
        stages=(1, 2),
    ),
    Run(name="transformer", images=1024, steps=400_000, sampler="packed", min_images=16, loads_images=False),
)
"""The transformer's images are units of 256 tokens: 262,144 tokens per step, at least 4096 per GPU."""


def simulate_run(run: Run, work: Work, node: Node, sheet: DataSheet, ranks: int, stage: int,
                 assumed: Assumptions, plan_steps: int = 60) -> dict[str, Any]:  # fmt: skip
    """Return time, GPU-hours, cost and memory of a run on `ranks` GPUs."""
    batch = max(run.min_images, round(run.images / ranks))
    steps = round(run.images * run.steps / (batch * ranks))
    compute, slowest = _computing(run, work, batch, ranks, plan_steps)
    link = Link(
        bytes_per_second=assumed.link_share * node.ring_bandwidth(ranks),
        seconds_per_collective=assumed.seconds_per_collective,
    )
    talking = communication(work.parameters, ranks, stage, link, BUCKET, work.layers)
    busy = slowest + talking
    rate = assumed.loader_images_per_second_per_core * node.cores / node.gpus
    loading = waiting_for_data(batch, busy, rate) if run.loads_images else 0.0
    step = busy + loading
    state = 12 * sum(work.parameters)
    failures = Failures(
        hours_between=assumed.failure_hours_per_gpu / ranks,
        checkpoint_seconds=state / assumed.storage_bytes_per_second,
        interval_seconds=CHECKPOINT_STEPS * step,
        restart_seconds=assumed.restart_seconds,
    )
    hours = steps * step / failures.useful / 3600
    memory = memory_bytes(run, work, batch, ranks, stage)
    return {
        "ranks": ranks,
        "stage": stage,
        "batch_per_rank": batch,
        "steps": steps,
        "global_batch_of_the_paper": batch * ranks == run.images,
        "step_seconds": step,
        "computing": compute / step,
        "waiting_for_ranks": (slowest - compute) / step,
        "communicating": talking / step,
        "waiting_for_data": loading / step,
        "useful_time": failures.useful,
        "hours": hours,
        "gpu_hours": hours * ranks,
        "cost": hours * ranks * node.price_per_gpu_hour,
        "memory_bytes": memory,
        "fits": memory <= (1 - RESERVED) * sheet.memory_bytes,
    }


def _computing(run: Run, work: Work, batch: int, ranks: int, plan_steps: int) -> tuple[float, float]:
    """Return the mean seconds of computing of a rank, and those of the slowest rank."""
    if run.sampler == "packed":
        (seconds,) = {cost(batch) for cost in work.seconds.values()}
        return seconds, seconds
    at_batch = {ratio: cost(batch) for ratio, cost in work.seconds.items()}
    mean = sum(share * at_batch[ratio] for ratio, share in SHARES.items())
    if run.sampler == "per_rank":
        return mean, slowest_of(at_batch, SHARES, ranks)
    costs = tuple((ratio, cost.fixed, cost.per_image) for ratio, cost in sorted(work.seconds.items()))
    return mean, mean / (1 - _balanced_wait(costs, batch, ranks, plan_steps))


@cache
def _balanced_wait(
    costs: tuple[tuple[int, float, float], ...], batch: int, ranks: int, plan_steps: int
) -> float:
    """Return the share of time that ranks wait under the balanced plan."""
    table = CostTable(costs={ratio: Cost(fixed, per_image) for ratio, fixed, per_image in costs})
    return simulate(BalancedPlan(SHARES, batch, ranks, 0, table), table, plan_steps)["wait"]


def memory_bytes(run: Run, work: Work, batch: int, ranks: int, stage: int) -> float:
    """Return the peak memory of a rank: weights, optimizer, gradients and activations."""
    shared = ranks if stage == 3 else 1
    zero = Zero(stage=min(stage, 2), ranks=ranks, bucket_bytes=4 * BUCKET)
    held = 0.0
    for count in work.parameters:
        at_rest = zero.at_rest(count)
        held += at_rest["weights"] / shared + at_rest["master weights"] + at_rest["optimizer"]
        held += zero.gradient_bytes(count)
    held += zero.bucket_bytes + 4 * work.parameters[0] / shared  # EMA
    return held + batch * max(work.activation_bytes.values())


def best(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the row of the fastest stage that fits into memory; of equal ones the lowest stage."""
    fitting = [row for row in rows if row["fits"]]
    return dict(min(fitting, key=lambda row: (row["hours"], row["stage"]))) if fitting else None


def simulate_all(works: Mapping[tuple[str, str], Work], sizes: Sequence[int] = WORLD_SIZES) -> dict[str, Any]:
    """Return all rows by run and GPU, and the best stage per number of GPUs.

    Args:
        works: by GPU and by `tokenizer` or `transformer`.
    """
    nodes, assumed = read_links()
    sheets, _ = read_sheets()
    found: dict[str, Any] = {}
    for run in RUNS:
        for gpu, node in nodes.items():
            work = works[gpu, run.name.split(",")[0]]
            by_size = {
                ranks: [
                    simulate_run(run, work, node, sheets[gpu], ranks, stage, assumed) for stage in run.stages
                ]
                for ranks in sizes
            }
            found[f"{run.name} on {gpu}"] = {
                "rows": [row for rows in by_size.values() for row in rows],
                "best": {str(ranks): best(rows) for ranks, rows in by_size.items()},
            }
    return found


def predicted_works(table: CostTable | None = None) -> dict[tuple[str, str], Work]:
    """Return the costs of both runs on every GPU, from the counted steps of the roofline."""
    steps = _steps()
    sheets, shares = read_sheets()
    works = {}
    for gpu, sheet in sheets.items():
        tokenizer = {
            ratio: _affine(steps[f"vae_{ratio}"], sheet, shares) for ratio in SHARES
        } if table is None else dict(table.costs)  # fmt: skip
        vae = steps["vae_8"]
        works[gpu, "tokenizer"] = Work(
            seconds=tokenizer,
            parameters=list(vae["parameters"].values()),
            activation_bytes={ratio: steps[f"vae_{ratio}"]["activation_bytes"] for ratio in SHARES},
            layers=200,
        )
        dit = steps["dit"]
        works[gpu, "transformer"] = Work(
            seconds={16: _affine(dit, sheet, shares)},
            parameters=list(dit["parameters"].values()),
            activation_bytes={16: dit["activation_bytes"]},
            layers=30,
        )
    return works


def _affine(step: Mapping[str, Any], sheet: DataSheet, shares: Shares) -> Cost:
    """Return a step's predicted seconds: the optimizer is fixed, the other operators follow the images."""
    times = {
        name: sum(
            sheet.seconds(call.flops, call.moved, step["dtype"], shares.matrix_share, shares.memory_share)
            for call in calls
        )
        for name, calls in step["calls"].items()
    }
    return Cost(times["optimizer"], times["batch"] / step["images"])


@cache
def _steps() -> dict[str, dict[str, Any]]:
    """Count one step of each run: operators, parameters and activations."""
    from benchmarks.bounds.steps import dit_step, vae_step
    from benchmarks.packing import compose_lengths
    from benchmarks.shared.mixes import MIXES

    counted = {f"vae_{ratio}": vae_step(f"vae_{ratio}", "cat_c16", ratio, 8, 64) for ratio in SHARES}
    counted["dit"] = dit_step("dit", "cat_xl", compose_lengths(MIXES["197"], 16_384), 16)
    found = {}
    for name, step in counted.items():
        calls: dict[str, list[Any]] = {"optimizer": [], "batch": []}
        for call in step.calls:
            calls["optimizer" if call.name == "adamw" else "batch"].append(call)
        ratio = int(name.split("_")[1]) if "_" in name else 0
        found[name] = {
            "dtype": step.dtype,
            "images": step.images if ratio else 64,  # units of 256 tokens
            "parameters": step.parameters,
            "calls": calls,
            "activation_bytes": _vae_bytes(ratio) if ratio else _dit_bytes(),
        }
    return found


def _vae_bytes(ratio: int) -> float:
    """Return the peak bytes of a tokenizer's step per image, counted with two images."""
    from benchmarks.efficiency.costs import training_memory

    return training_memory(f"fixed_{ratio}x_c16", ratio, 2) / 2


def _dit_bytes() -> float:
    """Return the activations that a block keeps for its backward pass, of all blocks, per 256 tokens in bf16.

    34 bytes per token and feature: norms, q, k, v, attention, projections, and the MLP's hidden layer twice.
    """
    return 34 * 256 * 1152 * 26


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a Markdown table of the best stage per number of GPUs."""
    header = ("run", "GPUs", "ZeRO", "batch", "step, s", "computing", "ranks wait", "communication", "data",
              "useful", "hours", "GPU-hours", "cost")  # fmt: skip
    for line in (header, ["---"] * len(header)):
        yield f"| {' | '.join(line)} |"
    for name, found in report["runs"].items():
        for ranks, row in found["best"].items():
            if row is None:
                yield f"| {name} | {ranks} | does not fit {'| ' * (len(header) - 3)}|"
                continue
            cells = [
                name,
                ranks,
                str(row["stage"]),
                f"{row['batch_per_rank']}" + ("" if row["global_batch_of_the_paper"] else " *"),
                f"{row['step_seconds']:.3g}",
                *(f"{row[key]:.0%}" for key in ("computing", "waiting_for_ranks", "communicating",
                                                 "waiting_for_data", "useful_time")),
                f"{row['hours']:,.0f}",
                f"{row['gpu_hours']:,.0f}",
                f"{row['cost']:,.0f}",
            ]  # fmt: skip
            yield f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print and write. Return 2 for invalid usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="cost table in seconds per step")
    given = parser.parse_args(arguments)
    try:
        if given.json:
            require_writable(given.json)
        table = CostTable.read(given.table).require(list(SHARES)) if given.table else None
        if table is not None and table.unit != "seconds":
            raise UserError(f"--table {given.table}: expected costs in seconds, got {table.unit}")
        nodes, assumed = read_links()
        report = {
            "about": {
                "benchmark": "scaling",
                "measured": "nothing: predicted from data sheets" if table is None else str(given.table),
                "assumptions": vars(assumed),
                "shares": {f"{ratio}x": share for ratio, share in SHARES.items()},
            },
            "nodes": {name: asdict(node) for name, node in nodes.items()},
            "runs": simulate_all(predicted_works(table)),
        }
    except UserError as error:
        console.print_error(error)
        return 2
    print("\n".join(lines(report)))
    print("* the global batch is larger than the paper's, with fewer steps for as many images")
    if given.json:
        with atomic_write(given.json) as part:
            part.write_text(json.dumps(rounded(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
