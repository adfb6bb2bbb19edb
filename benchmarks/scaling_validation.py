"""Validate the model of `benchmarks.scaling`: predict steps on two processes, then measure them.

    python -m benchmarks.scaling_validation --json FILE [--rounds N]

The parameters come from runs on one process (KNOWN: seconds = fixed + a * images and FLOPs by ratio + b *
parameters) and from a micro-benchmark of the link between two processes. The model then predicts steps on two
processes under ZeRO 1, 2 and 3 for three configurations that it has not seen: another batch, another mix and
another width. Measurements run in alternating rounds; a row passes if their median is within 15 % of the
prediction. All rows are shown. Exit codes: 0 all pass, 1 a miss. Takes about half an hour on two idle cores.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster.model import Link, communication, slowest_of
from benchmarks.cluster.processes import CONFIG, Setting, measure_link, step_seconds
from benchmarks.shared.simple_program import about
from cat_fast import console
from cat_fast.config import read_yaml
from cat_fast.data.files import require_writable, write_json
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

TOLERANCE = 0.15
ROUNDS = 3
STAGES = (1, 2, 3)
BUCKET = 50_000_000
RATIOS = (8, 16, 32)
KNOWN = (
    *(Setting(name=f"{ratio}x, 2 images", batch=2, shares={ratio: 1.0}) for ratio in RATIOS),
    *(Setting(name=f"{ratio}x, 6 images", batch=6, shares={ratio: 1.0}) for ratio in RATIOS),
    Setting(name="16x, 2 images, width 3", batch=2, width=3, shares={16: 1.0}),
)
"""Runs on one process that give the parameters."""
UNSEEN = (
    Setting(name="another batch", batch=4, shares={16: 1.0}),
    Setting(name="another mix", batch=4, shares={8: 0.5, 32: 0.5}),
    Setting(name="another width", batch=2, width=2, shares={16: 1.0}),
)
"""Configurations that are predicted on two processes."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Counted work of a setting: FLOPs of a step per image and ratio, and trained parameters."""

    flops: Mapping[int, float]
    parameters: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of a step on one process: fixed + per_flop * FLOPs + per_parameter * parameters."""

    fixed: float
    per_flop: float
    per_parameter: float

    def seconds(self, size: Size, ratio: int, batch: int, share: float = 1.0) -> float:
        """Return the seconds at one ratio; the optimizer updates a share of the parameters."""
        updated = self.per_parameter * size.parameters * share
        return self.fixed + self.per_flop * size.flops[ratio] * batch + updated


def fit_step(measured: Sequence[tuple[Setting, Size, float]]) -> StepCost:
    """Fit the cost of a step to runs of one ratio on one process, by least relative squares."""
    rows, seconds = [], []
    for setting, size, taken in measured:
        (ratio,) = setting.shares
        rows.append([1.0, size.flops[ratio] * setting.batch, size.parameters])
        seconds.append(taken)
    weights = 1 / np.array(seconds)
    columns = np.array(rows) * weights[:, None]
    scale = np.abs(columns).max(axis=0)
    found = np.linalg.lstsq(columns / scale, np.ones(len(rows)), rcond=None)[0] / scale
    fixed, per_flop, per_parameter = np.maximum(found, 0.0)
    return StepCost(fixed=float(fixed), per_flop=float(per_flop), per_parameter=float(per_parameter))


def fit_link(seconds: Mapping[int, float]) -> Link:
    """Fit bandwidth and latency to all-reduces between two processes.

    An all-reduce of n elements between two ranks sends 4 n bytes per rank.
    """
    sizes = np.array(sorted(seconds), dtype=float)
    times = np.array([seconds[int(size)] for size in sizes])
    columns = np.stack([np.ones_like(sizes), 4 * sizes], axis=1) / times[:, None]
    latency, per_byte = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)[0]
    return Link(bytes_per_second=float(1 / per_byte), seconds_per_collective=float(max(0.0, latency)))


def predict(setting: Setting, size: Size, stage: int, cost: StepCost, link: Link, ranks: int = 2) -> float:
    """Return the predicted seconds of a step on several processes."""
    costs = {ratio: cost.seconds(size, ratio, setting.batch, 1 / ranks) for ratio in setting.shares}
    computing = slowest_of(costs, setting.shares, ranks)
    return computing + communication([size.parameters], ranks, stage, link, BUCKET, size.layers)


def count_size(setting: Setting) -> Size:
    """Count the work of a setting on tensors without memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cat_fast import NestedAutoencoderKL
    from cat_fast.models.build import build_model

    arguments = read_yaml(CONFIG)["model"] | {"block_out_channels": setting.channels}
    with torch.device("meta"):
        model = build_model(NestedAutoencoderKL, arguments)
    flops = {}
    for ratio in RATIOS:
        image = torch.empty(1, 3, setting.side, setting.side, device="meta")
        with FlopCounterMode(display=False) as counter:
            model(image, ratio).sample.sum().backward()
        flops[ratio] = float(counter.get_total_flops())
    layers = sum(1 for module in model.modules() if any(True for _ in module.parameters(recurse=False)))
    return Size(flops=flops, parameters=sum(p.numel() for p in model.parameters()), layers=layers)


def validate(
    run: Callable[[Setting, int, int], float],
    link_seconds: Mapping[int, float],
    size_of: Callable[[Setting], Size] = count_size,
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return the parameters and one row per configuration and stage.

    Args:
        run: (setting, ranks, stage) -> measured seconds of a step.
        link_seconds: seconds of all-reduces by number of elements.
        size_of: counted work of a setting.
        rounds: number of alternating rounds over all rows.
        progress: called with a description before each run.
    """
    known = []
    for setting in KNOWN:
        progress(f"one process: {setting.name}")
        known.append((setting, size_of(setting), run(setting, 1, 1)))
    cost, link = fit_step(known), fit_link(link_seconds)
    cells = list(product(UNSEEN, STAGES))
    sizes = {setting.name: size_of(setting) for setting in UNSEEN}
    taken: dict[tuple[str, int], list[float]] = {(setting.name, stage): [] for setting, stage in cells}
    for number in range(rounds):
        for setting, stage in cells if number % 2 == 0 else reversed(cells):
            progress(f"two processes, round {number + 1}: {setting.name}, ZeRO {stage}")
            taken[setting.name, stage].append(run(setting, 2, stage))
    rows = []
    for setting, stage in cells:
        predicted = predict(setting, sizes[setting.name], stage, cost, link)
        measured = statistics.median(taken[setting.name, stage])
        error = predicted / measured - 1
        rows.append(
            {
                "configuration": setting.name,
                "stage": stage,
                "predicted": predicted,
                "measured": measured,
                "rounds": taken[setting.name, stage],
                "error": error,
                "within": abs(error) <= TOLERANCE,
            }
        )
    return {
        "step": asdict(cost),
        "link": asdict(link),
        "one_process": [{"configuration": setting.name, "seconds": seconds} for setting, _, seconds in known],
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the validation; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="alternating rounds over all rows")
    given = parser.parse_args(arguments)
    try:
        if given.rounds < 1:
            raise UserError(f"--rounds must be at least 1, got {given.rounds}")
        if given.json:
            require_writable(given.json)
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            count = iter(range(10**6))
            found = validate(
                lambda setting, ranks, stage: step_seconds(
                    setting, Path(folder) / str(next(count)), ranks, stage
                ),
                measure_link(),
                rounds=given.rounds,
                progress=lambda text: print(text, flush=True),
            )
    except UserError as error:
        console.print_error(error)
        return 2
    for row in found["rows"]:
        verdict = "ok" if row["within"] else "MISS"
        print(
            f"{row['configuration']}, ZeRO {row['stage']}: predicted {row['predicted'] * 1e3:.1f} ms, "
            f"measured {row['measured'] * 1e3:.1f} ms ({row['error']:+.0%}) {verdict}"
        )
    if given.json:
        write_json(given.json, {**found, "about": about("scaling_validation", load)})
    return 0 if all(row["within"] for row in found["rows"]) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
