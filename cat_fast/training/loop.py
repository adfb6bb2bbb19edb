"""The loop that every run shares: resume, step, log, checkpoint, export; and every way it can end."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from cat_fast.errors import UserError, first_line
from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.checkpoints.write_errors import as_write_error, write_on_main, write_together
from cat_fast.training.config.settings import RunConfig
from cat_fast.training.health.nan_guard import SKIPPED
from cat_fast.training.health.preemption import Preemption
from cat_fast.training.health.run_status import RunStatus, StatusFile, record_failure, sole_writer
from cat_fast.training.health.watchdog import Watchdog
from cat_fast.training.metrics import throughput
from cat_fast.training.metrics.run_log import GRIDS, METRICS, RunLog, report
from cat_fast.training.metrics.throughput import SUMMARY
from cat_fast.training.metrics.trackers import TENSORBOARD, WANDB_ID
from cat_fast.training.runtime.collective_errors import on_main, raise_together, require_shared
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.step import Request, Stepper, Steps

EXPORT = "model"
CHECKPOINTS = "checkpoints"


class Task(Steps, Protocol):
    """One model's training: its steps, and the methods below, which all ranks call together."""

    def save(self, folder: Path) -> None:
        """Write everything that resuming needs."""
        ...

    def load(self, folder: Path) -> None: ...

    def grid(self, step: int) -> tuple[Image.Image, dict[str, float]] | None:
        """Images of what the model can do after `step`, and figures about them; asked of rank 0 alone.

        None if it has none to show. Draws no random number.
        """
        ...

    def export(self, folder: Path) -> None:
        """Write the trained model for `from_pretrained`; only rank 0 writes."""
        ...

    def close(self) -> None:
        """End what works for the task beside this process, such as loaders."""
        ...


@dataclass(frozen=True)
class Preempted:
    """A run that was asked to end and saved first: by what, and after how many steps."""

    reason: str
    step: int


def run(task: Task, config: RunConfig, ranks: Ranks, command: str = "") -> Preempted | None:
    """Train to `schedule.total_steps`, from the newest whole checkpoint if there is one; export the model.

    Args:
        command: what starts this run again, for those who have to.

    Returns:
        None at the end of the schedule; else why it ended before, saved and told.

    Raises:
        UserError: too many steps were not finite; nothing can be written; another process trains in the same
            folder. What was saved before is kept.
    """
    folder = Path(config.output_dir)
    with ExitStack() as stack:
        stack.callback(task.close)
        on_main(lambda: stack.enter_context(sole_writer(folder)), ranks)
        require_shared(folder, ranks)
        stack.enter_context(_failures_told(folder, ranks))
        store = CheckpointStore(folder / CHECKPOINTS, ranks, config.checkpoint.keep_last)
        stack.callback(store.join)
        return _train(task, config, store, command)


def _train(task: Task, config: RunConfig, store: CheckpointStore, command: str) -> Preempted | None:
    ranks, folder, total = store.ranks, Path(config.output_dir), config.schedule.total_steps
    status = _open_status(config, ranks, folder, command)
    if config.checkpoint.resume == "never":
        write_on_main(lambda: _move_aside(folder), folder, "what was there before", ranks)
    ended: Preempted | None = None
    with (
        _state_told(status),
        Watchdog(folder, ranks, config.watchdog.timeout_seconds) as watchdog,
        Preemption().listening() as preemption,
    ):
        first = _resume(task, store, config)
        if status:
            status.status.step = first
        with _opened_log(config, first, ranks) as log, _Reports(log, status, task, folder) as reports:
            if status and log:
                status.status.skipped = log.skipped
            stepper = Stepper(task, config, ranks)

            def request() -> Request:
                return Request(preemption.requested, reports.trouble or store.failure)

            def during() -> Request:
                reports.flush()
                return request()

            def save(done: int) -> None:
                reports.flush()
                raise_together(reports.trouble or store.failure, ranks)
                watchdog.progress("saving a checkpoint")
                store.save(done, task.save)

            asked, saved = Request(), first
            for step in range(first, total):
                outcome = stepper.step(step, asked, during)
                done = step if outcome is None else step + 1
                if outcome is not None:
                    reports.keep(step, outcome.metrics)
                stop = outcome is None or outcome.stop
                if stop or done % config.checkpoint.every_steps == 0 or done == total:
                    if done != saved:
                        save(done)
                    saved = done
                watchdog.progress("training")
                if stop and done < total:
                    ended = Preempted(_reason_to_stop(preemption, ranks), done)
                    break
                asked = request()
        store.wait()
        if ended is None:
            watchdog.progress("exporting the model")
            _export(task, folder / EXPORT, ranks)
            if first < total:
                report(config, ranks)
        if status:
            status.end("preempted" if ended else "finished", ended.reason if ended else "")
    if ended and ranks.is_main:
        print(
            f"preempted ({ended.reason}) after step {ended.step} of {total}: all of it is saved; go on with: "
            f"{command or 'the same command'}",
            flush=True,
        )
    return ended


def _reason_to_stop(preemption: Preemption, ranks: Ranks) -> str:
    """Collective: return the reason of the first rank that has one; they have agreed that one does."""
    return next(reason for reason in ranks.gather(preemption.reason) if reason)


class _Reports:
    """Logs each step during the next one, while a device computes; what is left is logged at the exit.

    Only rank 0 has something to write. `trouble` is what keeps it from that, for all ranks to know: a metric
    that is not finite, or a log that cannot be written.
    """

    def __init__(self, log: RunLog | None, status: StatusFile | None, task: Task, folder: Path) -> None:
        self.log, self.status, self.task, self.folder = log, status, task, folder
        self.trouble: UserError | None = None
        self._kept: tuple[int, float, Callable[[], dict[str, float]]] | None = None

    def __enter__(self) -> "_Reports":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def keep(self, step: int, metrics: Callable[[], dict[str, float]]) -> None:
        """Keep a step that has just ended for the next `flush`; at once where a grid is due, which shows the
        weights of this step."""
        self._kept = step, time.perf_counter(), metrics
        if self.log and self.log.grid_is_due(step):
            self.flush()
            if self.trouble is None:
                self._write(self._draw_grid, step)

    def flush(self) -> None:
        """Log the step that was kept, if it was not yet."""
        kept, self._kept = self._kept, None
        if kept is not None and self.log:
            self._write(self._report, *kept)

    def _write(self, write: Callable[..., None], *arguments: Any) -> None:
        try:
            write(*arguments)
        except (OSError, UserError) as error:
            self.trouble = self.trouble or as_write_error(error, self.folder, "the log")

    def _report(self, step: int, at: float, metrics: Callable[[], dict[str, float]]) -> None:
        assert self.log
        found = _finite(metrics(), step, self.folder)
        if self.status:
            self.status.step(step + 1, found.get("loss"), SKIPPED in found)
        self.log.step(step, found, at)

    def _draw_grid(self, step: int) -> None:
        if self.log and (grid := self.task.grid(step)) is not None:
            self.log.grid(step, *grid)


@contextmanager
def _opened_log(config: RunConfig, first: int, ranks: Ranks) -> Iterator[RunLog | None]:
    """Collective: rank 0's log, None on the others; where it cannot be opened, all raise."""
    with ExitStack() as stack:
        logs: list[RunLog] = []

        def open_log() -> None:
            logs.append(
                stack.enter_context(RunLog(config, first, throughput.peak_flops(ranks, config.precision)))
            )

        write_on_main(open_log, Path(config.output_dir), "the log", ranks)
        yield logs[0] if logs else None


def _resume(task: Task, store: CheckpointStore, config: RunConfig) -> int:
    found = store.latest()
    if found is None:
        return 0
    step, checkpoint = found
    task.load(checkpoint)
    if store.ranks.is_main:
        print(f"resumed from {checkpoint} at step {step} of {config.schedule.total_steps}", flush=True)
    return step


def _move_aside(folder: Path) -> None:
    """Put what an earlier run left out of a fresh one's way; nothing is deleted."""
    if not list((folder / CHECKPOINTS).glob("step_*")):
        return
    number = 1
    while (aside := folder / f"earlier_{number}").exists():
        number += 1
    aside.mkdir()
    for name in (CHECKPOINTS, METRICS, TENSORBOARD, GRIDS, SUMMARY, WANDB_ID):
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    print(f"checkpoint.resume=never: what was trained here before is kept in {aside}", flush=True)


def _finite(metrics: dict[str, float], step: int, folder: Path) -> dict[str, float]:
    """The metrics to log: of a skipped step those that are finite, else all of them or a `UserError`."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad and SKIPPED not in metrics:
        raise UserError(
            f"step {step}: {', '.join(bad)} not finite; the last checkpoint in {folder} is untouched. "
            "Lower optimizer.lr or optimizer.max_grad_norm and start again"
        )
    return {name: value for name, value in metrics.items() if name not in bad}


def _open_status(config: RunConfig, ranks: Ranks, folder: Path, command: str) -> StatusFile | None:
    if not ranks.is_main:
        return None
    total = config.schedule.total_steps
    status = RunStatus(task=config.task, total_steps=total, ranks=ranks.world_size, command=command)
    return StatusFile(folder, status)


@contextmanager
def _state_told(status: StatusFile | None) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if status:
            status.end("failed", _reason(error))
        raise


@contextmanager
def _failures_told(folder: Path, ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        record_failure(folder, ranks.rank, _reason(error))
        raise


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    return (
        "interrupted"
        if isinstance(error, KeyboardInterrupt)
        else f"{type(error).__name__}: {first_line(error)}"
    )


def _export(task: Task, folder: Path, ranks: Ranks) -> None:
    """Replace the exported model whole: written beside it, then renamed."""
    part = folder.with_name(f".{folder.name}.part")
    if ranks.is_main:
        shutil.rmtree(part, ignore_errors=True)
    ranks.barrier()
    write_together(lambda: task.export(part), folder, "the model", ranks)

    def replace() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    write_on_main(replace, folder, "the model", ranks)
