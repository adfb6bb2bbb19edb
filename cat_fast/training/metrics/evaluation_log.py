"""Log of evaluations during a run: evaluation.jsonl, trackers, and evaluation.png, a panel per metric."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cat_fast.data.files import atomic_write
from cat_fast.training.metrics.held_out_evaluation import SECONDS
from cat_fast.training.metrics.trackers import Tracker

EVALUATIONS = "evaluation.jsonl"
PLOT = "evaluation.png"
MAX_SHARE = 0.05
"""Share of a run's time that evaluations should not exceed."""


class EvaluationLog:
    """Records of a run's evaluations; those of steps that a resumed run repeats are dropped.

    Args:
        folder: folder of the run.
        first_step: number of completed steps at the start.
    """

    def __init__(self, folder: Path, first_step: int, trackers: Sequence[Tracker]) -> None:
        self.folder, self.trackers = folder, trackers
        self.records = [record for record in read_evaluations(folder) if record["step"] < first_step]
        if (folder / EVALUATIONS).is_file():
            self._write()

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Log the evaluation of the model after `step`, and draw the plot again."""
        self.records.append({"step": step, **figures})
        self._write()
        for tracker in self.trackers:
            tracker.scalars(figures, step)
        with atomic_write(self.folder / PLOT, flush=False) as part:
            plot(self.records, part)

    def _write(self) -> None:
        with atomic_write(self.folder / EVALUATIONS) as part:
            part.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")


def read_evaluations(folder: Path) -> list[dict[str, float]]:
    """Return the records of a run's evaluations, {"step": ..., metric: value}; empty without evaluations."""
    path = folder / EVALUATIONS
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summarize_evaluations(folder: Path, training_seconds: float) -> dict[str, Any]:
    """Return the number of evaluations, their time and its share of the run's; empty without evaluations."""
    records = read_evaluations(folder)
    if not records:
        return {}
    seconds = sum(record[SECONDS] for record in records)
    total = training_seconds + seconds
    return {
        "evaluations": len(records),
        "evaluation_seconds": round(seconds, 2),
        "evaluation_share": round(seconds / total, 4) if total else None,
    }


def plot(records: Sequence[dict[str, float]], path: Path) -> None:
    """Draw every metric against steps, one line per ratio (`psnr_8x`) or size (`psnr_64px`)."""
    from matplotlib.figure import Figure

    lines: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, value in record.items():
            found = re.fullmatch(r"(.+)_(\d+(?:x|px))", name)
            metric, label = found.groups() if found else (name, "")
            if name not in ("step", SECONDS):
                lines[metric][label].append((record["step"] + 1, value))
    figure = Figure(figsize=(5 * len(lines), 4), layout="constrained")
    for ax, (metric, labels) in zip(
        figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True
    ):
        for label, places in sorted(labels.items(), key=lambda item: int(item[0].rstrip("px") or 0)):
            ax.plot(*zip(*places, strict=True), marker=".", label=label)
        ax.set_title(metric.replace("_", " "))
        ax.set_xlabel("steps")
        ax.grid(alpha=0.3)
        if any(labels):
            ax.legend()
    figure.savefig(path, dpi=100, format="png")
