"""Logging of a run: metrics.jsonl, trackers, and a progress bar on a terminal or else log lines.

    metrics.jsonl          one record per step: {"step": …, "seconds": …, metric: value, …}
    tensorboard/, wandb    the same and rates, under the tags of cat_fast.training.metrics.trackers
    grids/                 reconstructions, as PNG
    evaluation.jsonl, evaluation.png    metrics of held-out images
    summary.json           totals and mean rates, once the run is complete

Only rank 0 writes these files, in the run's folder.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from PIL import Image

from cat_fast.console import progress
from cat_fast.data.files import atomic_write
from cat_fast.training.config.settings import RunConfig
from cat_fast.training.health.nan_guard import SKIPPED
from cat_fast.training.metrics import throughput
from cat_fast.training.metrics.evaluation_log import MAX_SHARE, EvaluationLog, summarize_evaluations
from cat_fast.training.metrics.held_out_evaluation import SECONDS
from cat_fast.training.metrics.terms_by_ratio import TermsByRatio
from cat_fast.training.metrics.throughput import Throughput
from cat_fast.training.metrics.trackers import make_trackers, tags
from cat_fast.training.runtime.ranks import Ranks

METRICS = "metrics.jsonl"
GRIDS = "grids"
_WINDOW = 1 << 16
"""Bytes from the end of metrics.jsonl that are read for the last record; more if it is longer."""


class RunLog:
    """Rank 0's log of a run, which continues at `first_step` after resuming.

    On opening, it drops records of steps that a resumed run repeats, so each step is logged once.
    """

    def __init__(self, config: RunConfig, first_step: int, peak_flops: float | None = None) -> None:
        self.folder, self.config = Path(config.output_dir), config.logging
        self.total_steps = config.schedule.total_steps
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        self.skipped = 0
        """Number of skipped steps before `first_step`."""
        with atomic_write(path) as part, part.open("w") as kept:
            for record in iter_metrics(self.folder):
                if record["step"] < first_step:
                    kept.write(json.dumps(record) + "\n")
                    self.skipped += SKIPPED in record
        self.file = path.open("a", buffering=1)
        self.trackers = make_trackers(self.folder, config, first_step)
        self.evaluations = EvaluationLog(self.folder, first_step, self.trackers)
        self.throughput = Throughput(peak_flops)
        self.progress = progress("steps")
        self.bar = self.progress.add_task(config.task, total=self.total_steps, completed=first_step)
        self.terms = TermsByRatio()
        self.last = self.last_line = time.perf_counter()

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()
        # A full disk was already reported by the failed write, or the values are in metrics.jsonl.
        with suppress(OSError):
            self.file.close()
        for tracker in self.trackers:
            with suppress(OSError):
                tracker.close(failed=error is not None)

    def step(self, step: int, metrics: dict[str, float], at: float | None = None) -> None:
        """Log a step that ended when `time.perf_counter` was `at`; None is now."""
        now = time.perf_counter() if at is None else at
        record = {"step": step, "seconds": round(now - self.last, 4), **metrics}
        self.throughput.add(now - self.last, metrics)
        self.last = now
        self.file.write(json.dumps(record) + "\n")
        rates = self.throughput.rates()
        if step % self.config.scalars_every_steps == 0:
            for tracker in self.trackers:
                tracker.scalars(tags({**record, **rates}), step)
        loss = f"loss {metrics['loss']:.4g}" if "loss" in metrics else "no loss"  # skipped steps have none
        status = ", ".join([loss, *throughput.format_rates(rates)])
        self.terms.update(metrics)
        self.progress.note = "\n".join([status, *self.terms.lines()])
        self.progress.update(self.bar, completed=step + 1)
        if self.progress.disable and self._line_is_due(step + 1, now):
            left = (self.total_steps - step - 1) / rates["steps_per_second"] if rates else 0.0
            print(
                f"step {step + 1} of {self.total_steps}: {status}, {timedelta(seconds=round(left))} left",
                file=sys.stderr,
                flush=True,
            )
            self.last_line = now

    def _line_is_due(self, done: int, now: float) -> bool:
        return (
            done % self.config.every_steps == 0
            or done == self.total_steps
            or now - self.last_line >= self.config.every_seconds
        )

    def grid(self, step: int, image: Image.Image, figures: dict[str, float]) -> None:
        """Save a reconstruction grid of the model after `step`; log the grid and its metrics."""
        with atomic_write(self.folder / GRIDS / f"step_{step + 1:08d}.png") as part:
            image.save(part, "PNG")
        for tracker in self.trackers:
            tracker.image("reconstructions", image, step)
            tracker.scalars(figures, step)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Log an evaluation of the model after `step`; its time does not count as training."""
        self.last += figures[SECONDS]
        self.evaluations.add(step, figures)


def report(config: RunConfig, ranks: Ranks) -> None:
    """Collective: print the summary of a complete run and write summary.json to its folder."""
    peak_bytes = throughput.peak_bytes(ranks)
    if not ranks.is_main:
        return
    folder = Path(config.output_dir)
    summary = throughput.summarize(iter_metrics(folder), throughput.peak_flops(ranks, config.precision))
    summary |= {"ranks": ranks.world_size, "device": throughput.device_name(ranks), "peak_bytes": peak_bytes}
    summary |= summarize_evaluations(folder, summary["hours"] * 3600)
    if (summary.get("evaluation_share") or 0) > MAX_SHARE:
        share = f"{summary['evaluation_share']:.1%}"
        print(f"evaluations took {share} of the run: raise evaluation.every_steps", flush=True)
    throughput.write_summary(folder, summary)
    print(throughput.format_summary(summary), flush=True)


def iter_metrics(folder: Path) -> Iterator[dict[str, float]]:
    """Yield the records of a run so far, without a last line that is truncated because the run was killed."""
    path = folder / METRICS
    if not path.is_file():
        return
    with path.open(errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the records of a run so far."""
    return list(iter_metrics(folder))


def last_metrics(folder: Path) -> dict[str, float] | None:
    """Return the last record of a run so far, None without records; only the end of the file is read."""
    path = folder / METRICS
    if not path.is_file():
        return None
    with path.open("rb") as file:
        end, window = file.seek(0, os.SEEK_END), _WINDOW
        while True:
            start = file.seek(max(0, end - window))
            lines = file.read(end - start).split(b"\n")
            for line in reversed(lines if start == 0 else lines[1:]):  # the first one may be cut
                try:
                    return json.loads(line)
                except ValueError:
                    continue
            if start == 0:
                return None
            window *= 2
