"""Training loop shared by all tasks: resume, step, log, checkpoint, export, and handle every way to end."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from cat_fast.data.files import write_json
from cat_fast.errors import UserError, first_line
from cat_fast.kernels.linear.op import using
from cat_fast.training.checkpoints.initial_weights import RECORD, describe_initial_weights
from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.checkpoints.write_errors import as_write_error, write_on_main, write_together
from cat_fast.training.config.settings import RunConfig
from cat_fast.training.health.nan_guard import SKIPPED
from cat_fast.training.health.preemption import Preemption
from cat_fast.training.health.run_status import RunStatus, StatusFile, lock_folder, record_failure
from cat_fast.training.health.watchdog import Watchdog
from cat_fast.training.metrics import throughput
from cat_fast.training.metrics.evaluation_log import EVALUATIONS, PLOT
from cat_fast.training.metrics.run_log import GRIDS, METRICS, RunLog, report
from cat_fast.training.metrics.throughput import SUMMARY
from cat_fast.training.metrics.trackers import TENSORBOARD, WANDB_ID
from cat_fast.training.rehearsal import Rehearsable, rehearse
from cat_fast.training.runtime import linear_backend
from cat_fast.training.runtime.collective_errors import on_main, raise_together, require_shared_folder
from cat_fast.training.runtime.long_work import long_work_on_main
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.step import Request, Stepper, Steps

EXPORT = "model"
CHECKPOINTS = "checkpoints"


class Task(Steps, Rehearsable, Protocol):
    """Training of one model: its steps, and the methods below.

    `save`, `load` and `export` are collective: every rank must call them.
    """

    def save(self, folder: Path) -> None:
        """Write the complete state for resuming."""
        ...

    def load(self, folder: Path) -> None: ...

    def grid(self, step: int, columns: int | None = None) -> tuple[Image.Image, dict[str, float]] | None:
        """Return sample images of the model after `step` and their metrics, or None if there are none.

        Called on rank 0 only. Must not draw random numbers.

        Args:
            columns: number of images; None shows all.
        """
        ...

    def evaluate(self) -> dict[str, float] | None:
        """Return metrics of held-out images with the averaged weights, or None if the task has none.

        Called on rank 0 only, after the checkpoint of the step. Must not draw random numbers. Calls
        `ranks.step_context.report_progress` for each batch, on which the other ranks wait.
        """
        ...

    def export(self, folder: Path) -> None:
        """Write the trained model for `from_pretrained`; only rank 0 writes."""
        ...

    def close(self) -> None:
        """Stop the task's helper processes, such as data loaders."""
        ...


@dataclass(frozen=True)
class Preempted:
    """Reason of a stop before the end of the schedule, and the number of completed steps."""

    reason: str
    step: int


def run(task: Task, config: RunConfig, ranks: Ranks, command: str = "") -> Preempted | None:
    """Train to `schedule.total_steps`, from the newest valid checkpoint if there is one; export the model.

    Collective: every rank must call it.

    Args:
        command: command that resumes this run, for messages and the status file.

    Returns:
        None at the end of the schedule; else why the run was stopped before, after saving a checkpoint.

    Raises:
        UserError: too many steps were not finite; the folder is not writable; another process trains in the
            same folder; the rehearsal found that the run would fail later. Saved checkpoints are kept.
    """
    folder = Path(config.output_dir)
    with ExitStack() as stack:
        stack.callback(task.close)
        on_main(lambda: stack.enter_context(lock_folder(folder)), ranks)
        require_shared_folder(folder, ranks)
        stack.enter_context(_failure_recorded(folder, ranks))
        store = CheckpointStore(folder / CHECKPOINTS, ranks, config.checkpoint.keep_last)
        stack.callback(store.join)
        return _train(task, config, store, command)


def _train(task: Task, config: RunConfig, store: CheckpointStore, command: str) -> Preempted | None:
    ranks, folder, total = store.ranks, Path(config.output_dir), config.schedule.total_steps
    status = _open_status(config, ranks, folder, command)
    if config.checkpoint.resume == "never":
        write_on_main(lambda: _move_earlier_run(folder), folder, "the folder of the earlier run", ranks)
    preempted: Preempted | None = None
    with (
        _failed_status(status),
        Watchdog(folder, ranks, config.watchdog.timeout_seconds) as watchdog,
        Preemption().listening() as preemption,
        ExitStack() as stack,
    ):
        found = store.latest()
        backend = linear_backend.settle(config.linear_backend, found and found[1], ranks)
        stack.enter_context(using(backend))
        first = _resume(task, found, config, ranks)
        if config.initial_weights and not first:
            write_on_main(lambda: _record_initial_weights(config), folder, "the initial weights", ranks)

        def record_backend(into: Path) -> None:
            linear_backend.record(config.linear_backend, backend, into)

        write_on_main(lambda: record_backend(folder), folder, "the record of linear_backend", ranks)
        watchdog.progress("rehearsing")
        rehearse(task, config, store, folder / EXPORT, first)
        if status:
            status.status.step = first
        with _opened_log(config, first, ranks) as log, _DeferredLog(log, status, task, config) as deferred:
            if status and log:
                status.status.skipped = log.skipped
            stepper = Stepper(task, config, ranks)

            def current_request() -> Request:
                return Request(preemption.requested, deferred.error or store.failure)

            def during_backward() -> Request:
                deferred.flush()
                return current_request()

            def write_checkpoint(into: Path) -> None:
                task.save(into)
                if ranks.is_main:
                    record_backend(into)

            def save(done: int) -> None:
                deferred.flush()
                raise_together(deferred.error or store.failure, ranks)
                watchdog.progress("saving a checkpoint")
                store.save(done, write_checkpoint)

            def show(step: int) -> None:
                def progress() -> None:
                    watchdog.progress("drawing a grid or evaluating")

                progress()
                long_work_on_main(lambda: deferred.show(step), ranks, progress)
                raise_together(deferred.error, ranks)

            request, saved = Request(), first
            for step in range(first, total):
                result = stepper.step(step, request, during_backward)
                done = step if result is None else step + 1
                if result is not None:
                    deferred.add(step, result.metrics)
                stop = result is None or result.stop
                if stop or done % config.checkpoint.every_steps == 0 or done == total:
                    if done != saved:
                        save(done)
                    saved = done
                shows = config.logging.grid_is_due(step) or config.evaluation.is_due(step)
                if result is not None and shows:
                    show(step)  # after the checkpoint, so that a failure does not cost the steps before it
                watchdog.progress("training")
                if stop and done < total:
                    preempted = Preempted(_stop_reason(preemption, ranks), done)
                    break
                request = current_request()
        store.wait()
        if preempted is None:
            watchdog.progress("exporting the model")
            _export(task, folder / EXPORT, ranks)
            if first < total:
                report(config, ranks)
        if status:
            status.end("preempted" if preempted else "finished", preempted.reason if preempted else "")
    if preempted and ranks.is_main:
        print(
            f"preempted ({preempted.reason}) after step {preempted.step} of {total}: checkpoint saved; "
            f"resume with: {command or 'the same command'}",
            flush=True,
        )
    return preempted


def _stop_reason(preemption: Preemption, ranks: Ranks) -> str:
    """Return the reason of the first rank that has one, given that some rank does.

    Collective: every rank must call it.
    """
    return next(reason for reason in ranks.gather(preemption.reason) if reason)


class _DeferredLog:
    """Log that writes each step during the next one, while the device computes, and the last one at exit.

    Only rank 0 writes. `error` is its first failure, which ends all ranks: a metric that is not finite, or a
    log that is not writable.
    """

    def __init__(self, log: RunLog | None, status: StatusFile | None, task: Task, config: RunConfig) -> None:
        self.log, self.status, self.task, self.config = log, status, task, config
        self.folder = Path(config.output_dir)
        self.error: UserError | None = None
        self._pending: tuple[int, float, Callable[[], dict[str, float]]] | None = None

    def __enter__(self) -> "_DeferredLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def add(self, step: int, metrics: Callable[[], dict[str, float]]) -> None:
        """Add a completed step, to be logged by the next `flush`."""
        self._pending = step, time.perf_counter(), metrics

    def show(self, step: int) -> None:
        """Log `step` now, then the grid and the evaluation that are due, as they show its weights."""
        self.flush()
        for is_due, write in (
            (self.config.logging.grid_is_due(step), self._log_grid),
            (self.config.evaluation.is_due(step), self._log_evaluation),
        ):
            if is_due and self.error is None:
                self._write(write, step)

    def flush(self) -> None:
        """Log the pending step, if there is one."""
        pending, self._pending = self._pending, None
        if pending is not None and self.log:
            self._write(self._log_step, *pending)

    def _write(self, write: Callable[..., None], *arguments: Any) -> None:
        try:
            write(*arguments)
        except (OSError, UserError) as error:
            self.error = self.error or as_write_error(error, self.folder, "the log")

    def _log_step(self, step: int, at: float, metrics: Callable[[], dict[str, float]]) -> None:
        assert self.log
        finite = _require_finite(metrics(), step, self.folder)
        if self.status:
            self.status.step(step + 1, finite.get("loss"), SKIPPED in finite)
        self.log.step(step, finite, at)

    def _log_grid(self, step: int) -> None:
        if self.log and (grid := self.task.grid(step)) is not None:
            self.log.grid(step, *grid)

    def _log_evaluation(self, step: int) -> None:
        if self.log and (figures := self.task.evaluate()) is not None:
            self.log.evaluation(step, figures)


@contextmanager
def _opened_log(config: RunConfig, first: int, ranks: Ranks) -> Iterator[RunLog | None]:
    """Open the log on rank 0 and yield it there, None on the others; if that fails, all ranks raise.

    Collective: every rank must call it.
    """
    with ExitStack() as stack:
        logs: list[RunLog] = []

        def open_log() -> None:
            logs.append(
                stack.enter_context(RunLog(config, first, throughput.peak_flops(ranks, config.precision)))
            )

        write_on_main(open_log, Path(config.output_dir), "the log", ranks)
        yield logs[0] if logs else None


def _resume(task: Task, found: tuple[int, Path] | None, config: RunConfig, ranks: Ranks) -> int:
    if found is None:
        return 0
    step, checkpoint = found
    task.load(checkpoint)
    if ranks.is_main:
        print(f"resumed from {checkpoint} at step {step} of {config.schedule.total_steps}", flush=True)
    return step


def _record_initial_weights(config: RunConfig) -> None:
    record = describe_initial_weights(config.initial_weights)
    write_json(Path(config.output_dir) / RECORD, record)
    print(f"starting from the weights {record['weights']} of {config.initial_weights}", flush=True)


def _move_earlier_run(folder: Path) -> None:
    """Move the files of an earlier run to a subfolder before a new run starts; nothing is deleted."""
    if not list((folder / CHECKPOINTS).glob("step_*")):
        return
    number = 1
    while (aside := folder / f"earlier_{number}").exists():
        number += 1
    aside.mkdir()
    logs = (METRICS, TENSORBOARD, GRIDS, EVALUATIONS, PLOT, SUMMARY, WANDB_ID)
    for name in (CHECKPOINTS, *logs, RECORD, linear_backend.RECORD):
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    print(f"checkpoint.resume=never: the earlier run was moved to {aside}", flush=True)


def _require_finite(metrics: dict[str, float], step: int, folder: Path) -> dict[str, float]:
    """Return the finite metrics of a step.

    Raises:
        UserError: a metric of a step that was not skipped is not finite.
    """
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad and SKIPPED not in metrics:
        raise UserError(
            f"step {step}: {', '.join(bad)} not finite; the last checkpoint in {folder} is unchanged. "
            "Lower optimizer.lr or optimizer.max_grad_norm and restart"
        )
    return {name: value for name, value in metrics.items() if name not in bad}


def _open_status(config: RunConfig, ranks: Ranks, folder: Path, command: str) -> StatusFile | None:
    if not ranks.is_main:
        return None
    total = config.schedule.total_steps
    status = RunStatus(task=config.task, total_steps=total, ranks=ranks.world_size, command=command)
    return StatusFile(folder, status)


@contextmanager
def _failed_status(status: StatusFile | None) -> Iterator[None]:
    """Set the status to failed if the body raises."""
    try:
        yield
    except BaseException as error:
        if status:
            status.end("failed", _reason(error))
        raise


@contextmanager
def _failure_recorded(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Record the failure of this rank if the body raises."""
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
    """Replace the exported model atomically: write a hidden folder next to it, then rename it.

    Collective: every rank must call it.
    """
    part = folder.with_name(f".{folder.name}.part")
    if ranks.is_main:
        shutil.rmtree(part, ignore_errors=True)
    ranks.barrier()
    write_together(lambda: task.export(part), folder, "the model", ranks)

    def replace() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    write_on_main(replace, folder, "the model", ranks)
