"""Simulation of the paper's two runs on a number of GPUs under a ZeRO stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from benchmarks.bounds.data_sheets import DataSheet
from benchmarks.cluster.links import Assumptions, NcclLink, Node
from benchmarks.cluster.model import Failures, communicate, slowest_of, waiting_for_data
from benchmarks.cluster.work import Work, checkpoint_bytes, memory_bytes
from benchmarks.cluster.zero import CONTROL, exchanges
from benchmarks.shared.mixes import TOKENIZER_TRAINING
from cat_fast.data.sampling.balanced_plan import BalancedPlan
from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.data.sampling.step_plan import PerRankPlan, StepPlan

CHECKPOINT_STEPS = 5000
RESERVED = 0.1
"""Share of a GPU's memory that is left free."""
PLANNED_STEPS, PLANNED_BATCHES = 32, 4096
"""Least number of simulated steps, and of batches of all ranks, where no formula gives the waiting."""
TIE = 0.01
"""Relative difference of hours below which stages are equally fast."""


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
    max_images: int
    """Largest batch of a rank; more are accumulated."""
    loads_images: bool
    """True if images are decoded in training; latents need no decoding."""
    stages: Sequence[int] = (1, 2, 3)


_TOKENIZER = Run(
    name="tokenizer",
    images=512,
    steps=1_000_000,
    sampler="per_rank",
    min_images=1,
    max_images=512,
    loads_images=True,
    stages=(1, 2),  # a GAN does not train under ZeRO 3
)
RUNS = (
    _TOKENIZER,
    replace(_TOKENIZER, name="tokenizer, balanced", sampler="balanced"),
    Run(
        name="transformer",
        images=1024,
        steps=400_000,
        sampler="packed",
        min_images=16,
        max_images=64,
        loads_images=False,
    ),
)
"""The transformer's images are units of 256 tokens: 262,144 tokens per step, at least 4096 per GPU, and
batches of at most the 16,384 of configs/generator/cat_xl.yaml."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines of one kind."""

    node: Node
    sheet: DataSheet
    assumed: Assumptions
    loader_rate: float
    """Images per second that one core decodes."""


class Times(NamedTuple):
    """Seconds of computing per step, of all accumulated batches."""

    mean: float
    """Of a rank."""
    slowest: float
    """Until the slowest ranks have finished."""


def simulate_run(run: Run, work: Work, cluster: Cluster, ranks: int, stage: int) -> dict[str, Any]:
    """Return time, traffic, failures, GPU-hours, cost and memory of a run on `ranks` GPUs."""
    node, assumed = cluster.node, cluster.assumed
    images = max(run.min_images, round(run.images / ranks))
    batch, accumulation, memory = split_batch(run, work, cluster, ranks, stage, images)
    steps = round(run.images * run.steps / (images * ranks))
    seconds = {ratio: work.batch_seconds(ratio, batch, assumed.seconds_per_launch) for ratio in work.seconds}
    busy = _computing(run, work, assumed, batch, ranks, accumulation, together=stage == 1)
    update = work.optimizer_seconds / ranks
    link = NcclLink(node, ranks, assumed)
    backward = assumed.backward_share * busy.mean
    passes = {"forward": busy.mean - backward, "backward": backward / (accumulation if stage == 1 else 1)}
    talks = {
        engine.name: exchanges(engine.tensors, stage, accumulation) if ranks > 1 else []
        for engine in work.engines
    }
    # The other engines' gradients fit into one bucket, which nothing hides.
    parts = {
        name: communicate(found, link, **(passes if name == work.engines[0].name else {}))
        for name, found in talks.items()
    }
    control = link.seconds(CONTROL)
    sent = {name: sum(one.sent_bytes(ranks) for one in found) for name, found in talks.items()}
    talking = control + sum(part.exposed for part in parts.values())
    occupied = busy.slowest + update + talking
    rate = cluster.loader_rate * node.cores / node.gpus
    loading = waiting_for_data(images, occupied, rate) if run.loads_images else 0.0
    step = occupied + loading
    failures = Failures(
        hours_between=assumed.failure_hours_per_gpu / ranks,
        checkpoint_seconds=checkpoint_bytes(work, stage) / assumed.storage_bytes_per_second,
        interval_seconds=CHECKPOINT_STEPS * step,
        restart_seconds=assumed.restart_seconds,
    ).hours(steps * step / 3600)
    second = [engine.name for engine in work.engines[1:]]
    gpu_hours = failures["hours"] * ranks
    return {
        "ranks": ranks,
        "stage": stage,
        "batch": batch,
        "accumulation": accumulation,
        "steps": steps,
        "global_batch_of_the_paper": images * ranks == run.images,
        "step_ms": 1e3 * step,
        "computing_ms": 1e3 * (busy.mean + update),
        "host_bound": any(seconds[ratio] > cost(batch) for ratio, cost in work.seconds.items()),
        "ranks_wait_ms": 1e3 * (busy.slowest - busy.mean),
        "communication_ms": 1e3 * talking,
        "hidden_communication_ms": 1e3 * sum(part.hidden for part in parts.values()),
        "second_engine_ms": 1e3 * sum(parts[name].exposed for name in second),
        "data_wait_ms": 1e3 * loading,
        "nvlink_gb": sum(sent.values()) / 1e9,
        "network_gb": sum(sent.values()) / 1e9 if ranks > node.gpus else 0.0,
        "second_engine_gb": sum(sent[name] for name in second) / 1e9,
        "link_gb_per_second": link.bytes_per_second / 1e9,
        **failures,
        "gpu_hours": gpu_hours,
        "cost": gpu_hours * node.price_per_gpu_hour,
        "memory_gb": memory / 1e9,
        "fits": memory <= _capacity(cluster),
    }


def split_batch(
    run: Run, work: Work, cluster: Cluster, ranks: int, stage: int, images: int
) -> tuple[int, int, float]:
    """Return the largest batch that fits into memory, accumulated batches per step, and the memory in bytes.

    If none fits, the smallest is returned.
    """
    found: tuple[int, int, float] | None = None
    for accumulation in range(1, images + 1):
        batch = images // accumulation
        if images % accumulation or batch > run.max_images:
            continue
        if run.sampler == "packed":
            counts: Mapping[int, int] = dict.fromkeys(work.seconds, batch)
        else:
            counts = _plan(run.sampler, batch, ranks, _costs(work)).counts
        found = batch, accumulation, memory_bytes(work, counts, ranks, stage)
        if found[2] <= _capacity(cluster):
            break
    assert found is not None, "a batch of one image is always possible"
    return found


def _capacity(cluster: Cluster) -> float:
    return (1 - RESERVED) * cluster.sheet.memory_bytes


Costs = tuple[tuple[int, float, float], ...]


def _costs(work: Work) -> Costs:
    return tuple((ratio, cost.fixed, cost.per_image) for ratio, cost in sorted(work.seconds.items()))


@cache
def _plan(sampler: str, batch: int, ranks: int, costs: Costs) -> StepPlan:
    if sampler == "per_rank":
        return PerRankPlan(TOKENIZER_TRAINING, batch, ranks, seed=0)
    table = CostTable(costs={ratio: Cost(fixed, per_image) for ratio, fixed, per_image in costs})
    return BalancedPlan(TOKENIZER_TRAINING, batch, ranks, 0, table)


def _computing(
    run: Run, work: Work, assumed: Assumptions, batch: int, ranks: int, accumulation: int, *, together: bool
) -> Times:
    """Return the computing per step.

    Args:
        run, work, assumed, batch, ranks: as in `simulate_run`.
        accumulation: batches per step.
        together: True if ranks wait for each other once per step, False if after each batch.
    """
    launch = assumed.seconds_per_launch
    if run.sampler == "packed":
        (ratio,) = work.seconds
        seconds = accumulation * work.batch_seconds(ratio, batch, launch)
        return Times(seconds, seconds)
    if run.sampler == "per_rank" and (accumulation == 1 or not together):
        costs = {ratio: work.batch_seconds(ratio, batch, launch) for ratio in TOKENIZER_TRAINING}
        mean = sum(share * costs[ratio] for ratio, share in TOKENIZER_TRAINING.items())
        return Times(accumulation * mean, accumulation * slowest_of(costs, TOKENIZER_TRAINING, ranks))
    floors = tuple(launch * work.launches[ratio] for ratio in sorted(work.seconds))
    return _planned(run.sampler, batch, ranks, _costs(work), floors, accumulation, together)


@cache
def _planned(
    sampler: str,
    batch: int,
    ranks: int,
    costs: Costs,
    floors: tuple[float, ...],
    accumulation: int,
    together: bool,
) -> Times:
    """Simulate steps of a plan; return seconds per `batch` images of each rank and accumulated batch."""
    plan = _plan(sampler, batch, ranks, costs)
    by_ratio = {
        ratio: (fixed, slope, floor) for (ratio, fixed, slope), floor in zip(costs, floors, strict=True)
    }
    drawn = dict.fromkeys(by_ratio, 0)
    mean = slowest = 0.0
    steps = max(PLANNED_STEPS, PLANNED_BATCHES // (ranks * accumulation))
    for step in range(steps):
        totals = [0.0] * ranks
        for part in range(accumulation):
            taken = []
            for share in plan.plan(step * accumulation + part, drawn):
                fixed, slope, floor = by_ratio[share.ratio]
                taken.append(max(floor, fixed + slope * share.images))
                drawn[share.ratio] += share.images
            totals = [total + seconds for total, seconds in zip(totals, taken, strict=True)]
            slowest += 0.0 if together else max(taken)
        slowest += max(totals) if together else 0.0
        mean += sum(totals) / ranks
    per_step = batch * ranks * accumulation / sum(drawn.values())  # a balanced plan varies its batches
    return Times(mean * per_step, max(mean, slowest) * per_step)  # rounding must not give a negative wait


def best(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of the fastest stages that fit into memory: all that are equally fast, lowest first."""
    fitting = [row for row in rows if row["fits"]]
    limit = (1 + TIE) * min((row["hours"] for row in fitting), default=0.0)
    return sorted((row for row in fitting if row["hours"] <= limit), key=lambda row: row["stage"])
