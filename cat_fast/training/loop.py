"""The loop that every run shares: resume, step, log, checkpoint, export."""

import fcntl
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from PIL import Image

from cat_fast.errors import UserError
from cat_fast.training.checkpoint import CheckpointStore
from cat_fast.training.distributed import Ranks
from cat_fast.training.logs import RunLog, peak_flops_of, report
from cat_fast.training.settings import RunConfig

EXPORT = "model"


class Task(Protocol):
    """One model's training; every method is called by all ranks together."""

    def train_step(self, step: int) -> dict[str, float]:
        """Do one step and return its metrics, equal on all ranks; `loss` is among them."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything that resuming needs."""
        ...

    def load(self, folder: Path) -> None: ...

    def grid(self, step: int) -> tuple[Image.Image, dict[str, float]]:
        """A picture of what the model makes, and figures measured on it; asked of rank 0 alone, if at all."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained model for `from_pretrained`; only rank 0 writes."""
        ...


def run(task: Task, config: RunConfig, ranks: Ranks) -> None:
    """Train to `schedule.total_steps`, from the newest whole checkpoint if there is one; export the model.

    Raises:
        UserError: the loss is not finite (the last checkpoint is kept), or another process trains in the
            same folder.
    """
    folder = Path(config.output_dir)
    with _sole_writer(folder) if ranks.is_main else nullcontext():
        _train(task, config, ranks, folder)


def _train(task: Task, config: RunConfig, ranks: Ranks, folder: Path) -> None:
    store = CheckpointStore(folder / "checkpoints", ranks, config.checkpoint.keep_last)
    first = _resume(task, store, config)
    total = config.schedule.total_steps
    with RunLog(config, first, peak_flops_of(config, ranks)) if ranks.is_main else nullcontext() as log:
        for step in range(first, total):
            metrics = task.train_step(step)
            _require_finite(metrics, step, folder)
            if log:
                log.step(step, metrics)
                if log.grid_is_due(step):
                    log.grid(step, *task.grid(step))
            if (step + 1) % config.checkpoint.every_steps == 0 or step + 1 == total:
                store.save(step + 1, task.save)
    _export(task, folder / EXPORT, ranks)
    if first < total:
        report(config, ranks)


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Hold the run's folder; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is training here; wait for it or end it") from error
        yield


def _resume(task: Task, store: CheckpointStore, config: RunConfig) -> int:
    found = store.latest() if config.checkpoint.resume == "auto" else None
    if found is None:
        return 0
    step, checkpoint = found
    task.load(checkpoint)
    if store.ranks.is_main:
        print(f"resumed from {checkpoint} at step {step} of {config.schedule.total_steps}", flush=True)
    return step


def _require_finite(metrics: dict[str, float], step: int, folder: Path) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"step {step}: {', '.join(bad)} not finite; the last checkpoint in {folder} is untouched. "
            "Lower optimizer.lr or optimizer.max_grad_norm and start again"
        )


def _export(task: Task, folder: Path, ranks: Ranks) -> None:
    """Replace the exported model whole: written beside it, then renamed."""
    part = folder.with_name(f".{folder.name}.part")
    if ranks.is_main:
        shutil.rmtree(part, ignore_errors=True)
    ranks.barrier()
    task.export(part)
    if ranks.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    ranks.barrier()
