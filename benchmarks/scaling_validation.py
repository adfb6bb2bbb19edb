"""Validate the model of `benchmarks.scaling`: predict steps on two processes, then measure them.

    python -m benchmarks.scaling_validation --json FILE [--rounds N]

The parameters come from runs on one process (KNOWN: seconds = fixed + a * FLOPs + b * parameters, with an a
for linear layers and one for attention), from the time of AdamW, and from micro-benchmarks of the collectives
between two processes. Each process has one core, and a run on one process starts together with a copy on the
other core: they share the memory's bandwidth. The slower copy of each step counts.
The model then predicts steps on two processes for three configurations that it has not seen: another batch,
another mix and another width. They are steps of the transformer under ZeRO 1, 2 and 3, and of the tokenizer,
which refuses ZeRO 3, under ZeRO 1 and 2. Measurements run in alternating rounds, each with its own seed. A
prediction is that of the batches which are drawn in the measured steps. A row passes if the median of its
rounds is within 15 % of the prediction's median. All rows are shown, including failed ones.

FILE is written after each run. The same command resumes an incomplete FILE and repeats the runs that failed.
Exit codes: 0 all pass, 1 a miss or a failed run, 2 an error. Takes about 25 minutes on two idle cores.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.cluster.model import communicate
from benchmarks.cluster.processes import TOGETHER, Timings, measure_link, measure_optimizer, step_seconds
from benchmarks.cluster.settings import RATIOS, Batch, Setting, Size, TokenizerSetting, TransformerSetting
from benchmarks.cluster.zero import CONTROL, FP32, Exchange, exchanges
from benchmarks.shared.program import why_not_resumed
from benchmarks.shared.simple_program import about
from cat_fast import console
from cat_fast.data.files import require_writable, write_json
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

TOLERANCE = 0.15
ROUNDS = 3
STAGES = {"tokenizer": {1: 1, 2: 1}, "transformer": {1: 1, 2: 1, 3: 3}}
"""By model and predicted ZeRO stage: the stage of the runs on one process that give its parameters."""
KNOWN: Sequence[Setting] = (
    *(TokenizerSetting(name=f"{ratio}x, 2 images", batch=2, shares={ratio: 1.0}) for ratio in RATIOS),
    *(TokenizerSetting(name=f"{ratio}x, 6 images", batch=6, shares={ratio: 1.0}) for ratio in RATIOS),
    TokenizerSetting(name="16x, 2 images, width 3", batch=2, width=3, shares={16: 1.0}),
    TransformerSetting(name="16x, 1024 tokens", max_tokens=1024, ratios=[16]),
    TransformerSetting(name="16x, 3072 tokens", max_tokens=3072, ratios=[16]),
    TransformerSetting(name="8x, 1024 tokens", max_tokens=1024, ratios=[8]),
    TransformerSetting(name="8x, 3072 tokens", max_tokens=3072, ratios=[8]),
    TransformerSetting(name="16x, 1024 tokens, width 3", max_tokens=1024, width=3, ratios=[16]),
)
"""Runs on one process that give the parameters."""
UNSEEN: Sequence[Setting] = (
    TokenizerSetting(name="another batch", batch=4, shares={16: 1.0}),
    TokenizerSetting(name="another mix", batch=4, shares={8: 0.5, 32: 0.5}),
    TokenizerSetting(name="another width", batch=2, width=2, shares={16: 1.0}),
    TransformerSetting(name="another batch", max_tokens=2048, ratios=[16]),
    TransformerSetting(name="another mix", max_tokens=2048, ratios=[8, 32]),
    TransformerSetting(name="another width", max_tokens=1024, width=2, ratios=[16]),
)
"""Configurations that are predicted on two processes."""
RANKS = 2


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of a step on one process: fixed + per_flop * FLOPs + per_parameter * parameters."""

    fixed: float
    per_flop: Sequence[float]
    """By kind of operator."""
    per_parameter: float
    sharded: float = 0.0
    """Part of `per_parameter` that ranks share under ZeRO: the optimizer's update."""

    def seconds(self, size: Size, batch: Batch, ranks: int = 1) -> float:
        """Return the seconds of a rank's step without communication."""
        per_parameter = self.per_parameter - self.sharded + self.sharded / ranks
        computing = sum(a * n for a, n in zip(self.per_flop, size.batch_flops(batch), strict=True))
        return self.fixed + computing + per_parameter * sum(size.tensors)


@dataclass(frozen=True)
class MeasuredLink:
    """Link between two processes: seconds of a call and per byte of the complete tensors, by collective."""

    costs: Mapping[str, tuple[float, float]]

    def seconds(self, exchange: Exchange) -> float:
        """Return the time of all calls of an exchange."""
        latency, per_byte = self.costs[TOGETHER if exchange.together else exchange.collective]
        return exchange.calls * latency + per_byte * FP32 * exchange.elements


def fit_step(measured: Sequence[tuple[Setting, Size, float]], optimizer: Mapping[int, float]) -> StepCost:
    """Fit the cost of a step to runs on one process, by least squares of relative errors.

    Args:
        measured: settings, their counted work and the mean seconds of a step.
        optimizer: seconds of AdamW by number of parameters.
    """
    rows, seconds = [], []
    for setting, size, taken in measured:
        flops = zip(*(size.batch_flops(batch) for (batch,) in setting.draws(1, 0)), strict=True)
        rows.append([1.0, *map(statistics.fmean, flops), sum(size.tensors)])
        seconds.append(taken)
    fixed, *per_flop, per_parameter = _least_squares(rows, seconds)
    _, update = _least_squares([[1.0, size] for size in optimizer], list(optimizer.values()))
    return StepCost(
        fixed=fixed, per_flop=per_flop, per_parameter=per_parameter, sharded=min(update, per_parameter)
    )


def fit_link(seconds: Mapping[str, Timings]) -> MeasuredLink:
    """Fit latency and seconds per byte to each collective.

    Raises:
        UserError: larger tensors did not take longer.
    """
    costs = {}
    for name, timings in seconds.items():
        rows = [[calls, FP32 * elements] for calls, elements, _ in timings]
        latency, per_byte = _least_squares(rows, [taken for *_, taken in timings])
        if per_byte <= 0 and name != TOGETHER:  # many calls take as long whatever they send
            raise UserError(
                f"link: {name} of more elements did not take longer; repeat it on an idle machine"
            )
        costs[name] = latency, per_byte
    return MeasuredLink(costs)


def _least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Return the non-negative coefficients with the least squares of relative errors."""
    columns = np.array(rows, dtype=float) / np.array(values)[:, None]
    scale = np.abs(columns).max(axis=0)
    found, _ = nnls(columns / scale, np.ones(len(values)))
    return [float(value) for value in found / scale]


def predict(
    setting: Setting,
    size: Size,
    stage: int,
    cost: StepCost,
    link: MeasuredLink,
    seed: int,
    ranks: int = RANKS,
) -> float:
    """Return the predicted mean seconds of the measured steps of a run on several processes."""
    slowest = [max(cost.seconds(size, batch, ranks) for batch in draw) for draw in setting.draws(ranks, seed)]
    found = [*exchanges(size.tensors, stage), CONTROL]
    return statistics.fmean(slowest) + communicate(found, link).exposed


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    setting: Setting
    ranks: int
    stage: int
    round: int = 0
    """Also the seed."""

    @property
    def name(self) -> str:
        run = f"{self.ranks} ranks, round {self.round}"
        return f"{self.setting.model}, {self.setting.name}, ZeRO {self.stage}, {run}"


def predicted_pairs() -> list[tuple[Setting, int]]:
    """Return the configurations and stages of all rows."""
    return [(setting, stage) for setting in UNSEEN for stage in STAGES[setting.model]]


def plan(rounds: int) -> list[Cell]:
    """Return all runs in their order."""
    cells = [
        Cell(setting=setting, ranks=1, stage=stage)
        for setting in KNOWN
        for stage in sorted(set(STAGES[setting.model].values()))
    ]
    pairs = predicted_pairs()
    for number in range(rounds):
        for setting, stage in pairs if number % 2 == 0 else reversed(pairs):
            cells.append(Cell(setting=setting, ranks=RANKS, stage=stage, round=number))
    return cells


Runs = dict[str, dict[str, Any]]
"""By the name of a cell: its `seconds`, or the `error` that ended it."""


def measure(
    cells: Sequence[Cell], runs: Runs, run: Callable[[Cell], float], save: Callable[[], None]
) -> None:
    """Measure the cells that `runs` lacks or that failed, and save after each.

    Args:
        cells: in the order of the runs.
        runs: earlier results, to which new ones are added.
        run: returns the seconds of a step. A RuntimeError is recorded.
        save: called after each run.
    """
    for cell in cells:
        if "seconds" in runs.get(cell.name, {}):
            continue
        try:
            runs[cell.name] = {"seconds": run(cell)}
        except RuntimeError as error:
            runs[cell.name] = {"error": str(error)[-500:]}
        save()


def report(
    cells: Sequence[Cell],
    runs: Runs,
    link_seconds: Mapping[str, Timings],
    optimizer_seconds: Mapping[int, float],
    size_of: Callable[[Setting], Size] = lambda setting: setting.count(),
) -> dict[str, Any]:
    """Return the fitted parameters, and one row per configuration and stage.

    Raises:
        UserError: a run on one process failed, or the link cannot be fitted.
    """
    link = fit_link(link_seconds)
    known: defaultdict[tuple[str, int], list[tuple[Setting, Size, float]]] = defaultdict(list)
    for cell in cells:
        if cell.ranks == 1:
            if "error" in runs[cell.name]:
                raise UserError(f"{cell.name}: {runs[cell.name]['error']}; the same command repeats it")
            measured = cell.setting, size_of(cell.setting), runs[cell.name]["seconds"]
            known[cell.setting.model, cell.stage].append(measured)
    costs = {key: fit_step(measured, optimizer_seconds) for key, measured in known.items()}
    rows = []
    for setting, stage in predicted_pairs():
        own = [cell for cell in cells if (cell.setting, cell.stage, cell.ranks) == (setting, stage, RANKS)]
        cost = costs[setting.model, STAGES[setting.model][stage]]
        rows.append(_row(own, runs, size_of(setting), cost, link))
    steps = {f"{model}, ZeRO {stage}": asdict(cost) for (model, stage), cost in costs.items()}
    return {
        "steps": steps,
        "link": dict(link.costs),
        "link_seconds": link_seconds,
        "optimizer_seconds": optimizer_seconds,
        "rows": rows,
    }


def _row(cells: Sequence[Cell], runs: Runs, size: Size, cost: StepCost, link: MeasuredLink) -> dict[str, Any]:
    first = cells[0]
    row: dict[str, Any] = {
        "model": first.setting.model,
        "configuration": first.setting.name,
        "stage": first.stage,
        "within": False,
    }
    predicted = [predict(cell.setting, size, cell.stage, cost, link, cell.round) for cell in cells]
    row["predicted"] = statistics.median(predicted)
    if errors := [found["error"] for cell in cells if "error" in (found := runs[cell.name])]:
        return row | {"failed": errors[0]}
    taken = [runs[cell.name]["seconds"] for cell in cells]
    row["measured"] = statistics.median(taken)
    row["error"] = row["predicted"] / row["measured"] - 1
    row["within"] = abs(row["error"]) <= TOLERANCE
    return row | {"rounds": [list(pair) for pair in zip(predicted, taken, strict=True)]}


def line(row: Mapping[str, Any]) -> str:
    """Format a row as text."""
    name = f"{row['model']}, {row['configuration']}, ZeRO {row['stage']}"
    text = f"{name}: predicted {row['predicted'] * 1e3:.1f} ms, "
    if "failed" in row:
        return f"{text}FAILED: {row['failed'].splitlines()[-1]}"
    verdict = "ok" if row["within"] else "MISS"
    return f"{text}measured {row['measured'] * 1e3:.1f} ms ({row['error']:+.0%}) {verdict}"


def read_runs(path: Path | None, machine: Mapping[str, Any]) -> Runs:
    """Return the runs of an incomplete file, or none.

    Raises:
        UserError: the file is not one of this program, or of another machine or commit.
    """
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        earlier, runs = content["about"], content["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected results of scaling_validation ({error!r}); remove it") from error
    if not earlier.get("missing"):
        return {}  # complete: measured again
    if reason := why_not_resumed(content, {key: machine[key] for key in ("cpu", "packages", "commit")}):
        raise UserError(f"{path}: {reason}; remove it to measure again")
    return dict(runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the validation; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="alternating rounds over all rows")
    given = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    try:
        if given.rounds < 1:
            raise UserError(f"--rounds must be at least 1, got {given.rounds}")
        if given.json:
            require_writable(given.json)
        runs = read_runs(given.json, about("scaling_validation", load))
        cells = plan(given.rounds)

        def save(more: Mapping[str, Any] | None = None) -> None:
            if given.json:
                missing = [cell.name for cell in cells if "seconds" not in runs.get(cell.name, {})]
                missing += [] if more else ["report"]
                described = about("scaling_validation", load) | ({"missing": missing} if missing else {})
                write_json(given.json, {**(more or {}), "runs": runs, "about": described})

        def run(cell: Cell) -> float:
            print(cell.name, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                return step_seconds(cell.setting, Path(folder), cell.ranks, cell.stage, cell.round)

        measure(cells, runs, run, save)
        found = report(cells, runs, measure_link(), measure_optimizer())
        save(found)
    except UserError as error:
        console.print_error(error)
        return 2
    print("\n".join(map(line, found["rows"])))
    return 0 if all(row["within"] for row in found["rows"]) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
