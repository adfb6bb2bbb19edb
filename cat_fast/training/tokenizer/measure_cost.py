"""Cost of a training step by ratio and number of images: measured, or counted operations as a fallback."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.data.sampling.cost_table import Cost, CostTable, Measurement, fit
from cat_fast.errors import UserError
from cat_fast.hardware import run_device_type
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
    """Time complete training steps of one rank on this machine, without communication, at every ratio.

    Each repeat covers all ratios and batches, so that a machine that slows down affects all of them.

    Args:
        batches: numbers of images per batch; at least two different ones.
        device: None uses the GPU if there is one.
        on_step: called after each of `num_timed_steps` steps with a description of it.

    Raises:
        UserError: fewer than two batches, an image size that is not a multiple of a ratio, or an invalid
            model.
    """
    device = torch.device(device or run_device_type())
    if len(set(batches)) < 2 or min(batches) < 1:
        raise UserError(f"--batches: expected at least two different numbers of images, got {list(batches)}")
    torch.manual_seed(config.seed)
    workload = Workload(config, device)
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
        "side": config.data.image_size,
        "precision": config.precision,
        "gradient_checkpointing": config.gradient_checkpointing,
        "device": device.type,
    }
    return fit([_measurement(*cell, values) for cell, values in seconds.items()], about)


def num_timed_steps(config: TokenizerRun, batches: Sequence[int], repeats: int) -> int:
    """Return the number of steps that `measure` runs."""
    ratios = config.model.get("ratios", (8, 16, 32))
    return len(ratios) * len(set(batches)) * (repeats + 1)


def default_batches(batch_size: int) -> list[int]:
    """Return batch sizes around the configured one, over the range that a balanced plan uses."""
    return sorted({max(1, batch_size // 2), max(2, batch_size), max(3, batch_size * 3 // 2)})


def count_operations(config: TokenizerRun) -> CostTable:
    """Count the floating-point operations of a step on fake tensors, as a fallback for a measured table.

    Unlike `flops`, this includes overhead such as the ghost pass. A measured table is better: here
    memory-bound operators count as zero, and attention counts as N x N products, which overestimates heads of
    one dimension.
    """
    costs = {}
    with FakeTensorMode():
        workload = Workload(config, "cpu")
        for ratio in workload.model.ratios:
            one, two = (_operations(workload, ratio, count) for count in (1, 2))
            costs[ratio] = Cost(float(2 * one - two), float(two - one))
    about = {
        "what": "floating-point operations of a training step, counted as a fallback for a measurement",
        "side": config.data.image_size,
    }
    return CostTable(costs=costs, unit="flops", about=about)


def load_costs(config: TokenizerRun, ranks: Ranks) -> CostTable | None:
    """Collective: return the cost table for `sampler.mode: balanced`, or None for other modes.

    It is the configured table, or else counted operations. All ranks use rank 0's table, because ranks with
    different tables would train on each other's images.

    Raises:
        UserError: the file is not a valid cost table.
    """
    return on_main(lambda: _table(config), ranks) if config.sampler.mode == "balanced" else None


def _table(config: TokenizerRun) -> CostTable:
    if config.sampler.cost_table:
        return CostTable.read(config.sampler.cost_table)
    print(
        "sampler.cost_table is not set: ranks are balanced by counted operations, not by time; run "
        "`cat-fast plan cost` to measure a table",
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
        reconstructions = workload.reconstruct(batch)
        if workload.adversarial:
            workload.discriminate(batch, reconstructions, r1=False)
    return counter.get_total_flops()


def _measurement(ratio: int, count: int, seconds: Sequence[float]) -> Measurement:
    if len(seconds) == 1:
        low = high = seconds[0]
    else:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Measurement(ratio, count, statistics.median(seconds), low, high, len(seconds))
