"""What a training step costs by ratio and number of images: measured here, or counted as a fallback."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.data.sampling.cost_table import Cost, CostTable, Measurement, fit
from cat_fast.errors import UserError
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.runtime.collective_errors import on_main
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.tokenizer.synthetic_step import Workload


def measure(
    config: TokenizerRun,
    batches: Sequence[int],
    repeats: int = 5,
    *,
    device: torch.device | str | None = None,
    on_step: Callable[[str], None] = lambda name: None,
) -> CostTable:
    """Time whole training steps of one rank on this machine, at every ratio of the model.

    The GPU if there is one, or `device`; without what ranks say to one another. Repeats go round the ratios
    and batches, so that a machine that slows down slows all of them. `on_step` is told what was done,
    after each of `steps_of` steps.

    Raises:
        UserError: fewer than two batches, images that the ratios do not divide, or a model that is refused.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if len(set(batches)) < 2 or min(batches) < 1:
        raise UserError(f"--batches: {list(batches)}: at least two different numbers of images are needed")
    torch.manual_seed(config.seed)
    workload = Workload(config, device)
    if workload.side % max(workload.model.ratios):
        raise UserError(
            f"data.image_size: {workload.side} is no multiple of the ratio {max(workload.model.ratios)}"
        )
    cells = list(product(workload.model.ratios, sorted(set(batches))))
    seconds: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
    for round_ in range(repeats + 1):  # the first one warms up
        for ratio, count in cells:
            taken = _time(workload, ratio, count)
            if round_:
                seconds[ratio, count].append(taken)
            on_step(f"{ratio}x, {count} images")
    about = {
        "what": "a training step of one rank, without communication: autoencoder, losses"
        + (", discriminator" if workload.adversarial else "")
        + ", AdamW",
        "side": workload.side,
        "precision": config.precision,
        "gradient_checkpointing": config.gradient_checkpointing,
        "device": device.type,
    }
    return fit([_measurement(*cell, values) for cell, values in seconds.items()], about)


def steps_of(config: TokenizerRun, batches: Sequence[int], repeats: int) -> int:
    """How many steps `measure` does."""
    ratios = config.model.get("ratios", (8, 16, 32))
    return len(ratios) * len(set(batches)) * (repeats + 1)


def default_batches(batch_size: int) -> list[int]:
    """Around the configuration's batch, as far as a balanced plan goes from it."""
    return sorted({max(1, batch_size // 2), max(2, batch_size), max(3, batch_size * 3 // 2)})


def count_operations(config: TokenizerRun) -> CostTable:
    """Floating-point operations of a step instead of its seconds, for where nothing was measured.

    Counted on fake tensors: all that a step does (`flops` counts what of it is of use). Operators that are
    bound by memory count for nothing, and attention as N x N products, more than the operator for heads of
    one dimension does: a measured table is better.
    """
    costs = {}
    with FakeTensorMode():
        workload = Workload(config, "cpu")
        for ratio in workload.model.ratios:
            one, two = (_operations(workload, ratio, count) for count in (1, 2))
            costs[ratio] = Cost(float(2 * one - two), float(two - one))
    about = {
        "what": "floating-point operations of a training step, counted: a fallback, nothing was measured",
        "side": workload.side,
    }
    return CostTable(costs=costs, unit="flops", about=about)


def costs_of(config: TokenizerRun, ranks: Ranks) -> CostTable | None:
    """Collective: what `sampler.mode: balanced` goes by, the measured table, else counted operations.

    Rank 0's, on every rank: ranks that planned by different tables would train on each other's images. None
    for other modes.

    Raises:
        UserError: the file is no cost table.
    """
    return on_main(lambda: _table(config), ranks) if config.sampler.mode == "balanced" else None


def _table(config: TokenizerRun) -> CostTable:
    if config.sampler.cost_table:
        return CostTable.read(config.sampler.cost_table)
    print(
        "sampler: no cost_table is given, so that ranks are balanced by counted operations, not by time; "
        "cat-fast plan cost measures a table",
        flush=True,
    )
    return count_operations(config)


def _time(workload: Workload, ratio: int, count: int) -> float:
    batch = workload.batch(ratio, count)
    _synchronize(workload.device)
    start = time.perf_counter()
    workload.step(batch)
    _synchronize(workload.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _operations(workload: Workload, ratio: int, count: int) -> int:
    batch = workload.batch(ratio, count)
    with FlopCounterMode(display=False) as counter:
        reconstructions = workload.generate(batch)
        if workload.adversarial:
            workload.judge(batch, reconstructions, r1=False)
    return counter.get_total_flops()


def _measurement(ratio: int, count: int, seconds: Sequence[float]) -> Measurement:
    if len(seconds) == 1:
        low = high = seconds[0]
    else:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Measurement(ratio, count, statistics.median(seconds), low, high, len(seconds))
