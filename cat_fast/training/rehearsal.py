"""Rehearsal: before the first step, try out what would otherwise happen for the first time at a late one.

    step         forward and backward passes of the largest batch, with the GAN, R1 and LeCam
    grid         reconstructions of one image at every ratio
    checkpoint   every rank can write, and the disk has room for as many as the run keeps at a time
    model        likewise for the export of the averaged weights

Checkpoint and model are also written and deleted where that takes less time than the step. A rehearsal
changes neither weights, gradients, optimizer, averages, random states and data position nor the log. It is
repeated on resume only if the configuration has changed since.
"""

import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from cat_fast.data.files import atomic_write, write_json
from cat_fast.errors import UserError, first_line
from cat_fast.hardware import is_out_of_memory
from cat_fast.training.checkpoints.space import StateBytes, format_bytes, require_space
from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.checkpoints.write_errors import as_write_error, write_on_main, write_together
from cat_fast.training.config.deepspeed_json import read_deepspeed_config
from cat_fast.training.config.settings import RunConfig
from cat_fast.training.metrics.run_log import GRIDS
from cat_fast.training.metrics.throughput import SUMMARY
from cat_fast.training.runtime.collective_errors import on_each, on_main
from cat_fast.training.runtime.host_memory import available_bytes, memory_limit, memory_per_rank
from cat_fast.training.runtime.ranks import Ranks

REHEARSAL = "rehearsal.json"
_WRITE_RATE = 200 << 20
"""Assumed bytes per second to write a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LargestStep:
    """The step that needs the most memory of all that a run can have."""

    what: str
    """Description of its batch and losses, such as `4 images at 8x, with the GAN`."""
    lower: str
    """Configuration key to lower if memory runs out."""
    settings: str
    """Configuration keys to check after any other error."""
    run: Callable[[], None]
    """Run its forward and backward passes; change nothing."""
    communicates: bool = False
    """True if `run` needs all ranks. An error then ends its rank at once, since the others cannot answer."""


class Rehearsable(Protocol):
    """Methods of a task that a rehearsal needs; see `loop.Task` for the others."""

    def largest_step(self) -> LargestStep: ...

    def state_bytes(self) -> StateBytes:
        """Return estimates of the size of a checkpoint and of the exported model."""
        ...

    def grid(self, step: int, columns: int | None = None) -> tuple[Image.Image, dict[str, float]] | None: ...

    def save(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None: ...


def rehearse(
    task: Rehearsable, config: RunConfig, store: CheckpointStore, model_folder: Path, first: int
) -> None:
    """Rehearse a run that continues at step `first`, unless it is complete or was rehearsed as it is.

    Collective: every rank must call it.

    Args:
        model_folder: folder to which the run exports its model.

    Raises:
        UserError: the run would fail at a later step; the message names the key to change.
    """
    ranks, folder = store.ranks, Path(config.output_dir)
    if not config.rehearsal or first >= config.schedule.total_steps:
        return
    digest = _digest(config, ranks)
    if first and on_main(lambda: _rehearsed(folder) == digest, ranks):
        return
    start = time.perf_counter()
    on_main(lambda: _require_free_names(folder, model_folder, store.folder), ranks)
    with _randomness_restored(ranks.device):
        largest = task.largest_step()
        seconds = _rehearse_step(largest, config, ranks)
        done = [f"a step of {largest.what}"]
        if config.logging.grid_every_steps:
            on_main(lambda: _rehearse_grid(task, folder, first), ranks)
            done.append("a grid")
        done.append(_rehearse_writes(task, config, store, model_folder, first, seconds))
    record = {"configuration": digest, "rehearsed": done}
    write_on_main(lambda: write_json(folder / REHEARSAL, record), folder, "the rehearsal's record", ranks)
    if ranks.is_main:
        seconds = time.perf_counter() - start
        print(f"rehearsed in {seconds:.1f} s: {', '.join(done)}", file=sys.stderr, flush=True)


def _digest(config: RunConfig, ranks: Ranks) -> str:
    """Return a hash of everything that a rehearsal depends on."""
    values = asdict(config)
    del values["checkpoint"]["resume"]  # a command that resumes may differ in this key only
    values |= {"ranks": ranks.world_size, "deepspeed_json": read_deepspeed_config(config.deepspeed)}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _rehearsed(folder: Path) -> str | None:
    """Return the digest of the last rehearsal in a run's folder; None if there is none."""
    try:
        return json.loads((folder / REHEARSAL).read_text())["configuration"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _randomness_restored(device: torch.device) -> Iterator[None]:
    """Restore the global random states of torch, NumPy and Python at exit."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _rehearse_step(step: LargestStep, config: RunConfig, ranks: Ranks) -> float:
    """Collective: run the largest step; return its time on the slowest rank in seconds."""
    memory = memory_per_rank(ranks.world_size)
    # Without a limit, a process on the CPU that takes too much memory is killed without a message.
    limit = memory_limit(memory) if ranks.device.type == "cpu" else nullcontext()

    def run() -> float:
        start = time.perf_counter()
        try:
            with limit:
                step.run()
                if ranks.device.type == "cuda":
                    torch.cuda.synchronize()
        except Exception as error:
            raise _refusal(step, error, config, memory, ranks.device) from error
        return time.perf_counter() - start

    seconds = run() if step.communicates else on_each(run, ranks)
    return max(ranks.gather(seconds))


def _refusal(
    step: LargestStep, error: Exception, config: RunConfig, memory: int, device: torch.device
) -> UserError:
    """Return the error of a step that cannot be run."""
    if isinstance(error, UserError):
        return UserError(f"rehearsal of a step of {step.what}: {error}")
    if not is_out_of_memory(error):
        return UserError(
            f"rehearsal of a step of {step.what} fails ({type(error).__name__}: {first_line(error)}): check "
            f"{step.settings}"
        )
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    changes = [f"lower {step.lower}"]
    if config.checkpoints_gradients and not config.gradient_checkpointing:
        changes.append("set gradient_checkpointing=true")
    changes += ["set precision=bf16"] * (config.precision == "fp32")
    return UserError(
        f"rehearsal of a step of {step.what}: it needs more than the {format_bytes(memory)} of memory "
        f"{'of the GPU' if device.type == 'cuda' else 'that this rank can use'}: {', or '.join(changes)}"
    )


def _require_free_names(folder: Path, model_folder: Path, checkpoints: Path) -> None:
    """Check that nothing else has the name of a file or folder that the run writes later."""
    for path in (model_folder, checkpoints, folder / GRIDS):
        replaced = path == model_folder and path.is_symlink()  # a link cannot be replaced by a folder
        if replaced or (path.exists() and not path.is_dir()):
            kind = "a symbolic link" if replaced else "not a folder"
            raise UserError(
                f"output_dir: {path} is {kind}, but the run will write a folder of this name: move it, or "
                "choose another output_dir"
            )
    if (folder / SUMMARY).is_dir():
        raise UserError(
            f"output_dir: {folder / SUMMARY} is a folder, but the run will write a file of this name: move "
            "it, or choose another output_dir"
        )


def _rehearse_grid(task: Rehearsable, folder: Path, step: int) -> None:
    """Draw a grid of one image, write it as PNG and delete it; called on rank 0 only."""
    grids = folder / GRIDS
    existed = grids.exists()
    try:
        drawn = task.grid(step, columns=1)
        if drawn is not None:
            with atomic_write(grids / ".rehearsal.png", flush=False) as part:
                drawn[0].save(part, "PNG")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"rehearsal of a grid fails ({type(error).__name__}: {first_line(error)}): check "
            "data.image_size and data.held_out, or set logging.grid_every_steps=0"
        ) from error
    finally:
        (grids / ".rehearsal.png").unlink(missing_ok=True)
        if not existed and grids.is_dir():
            grids.rmdir()


def _rehearse_writes(
    task: Rehearsable,
    config: RunConfig,
    store: CheckpointStore,
    model_folder: Path,
    first: int,
    seconds: float,
) -> str:
    """Collective: check that checkpoints and the model can be written; return a description.

    Args:
        seconds: maximum time to write them for a trial.
    """
    ranks, sizes = store.ranks, task.state_bytes()
    part = model_folder.with_name(f".{model_folder.name}.part")

    def check(sizes: StateBytes) -> None:
        on_main(lambda: require_space(config, store.folder, sizes, first), ranks)

    check(sizes)
    on_trial = (sizes.checkpoint + sizes.model) / _WRITE_RATE <= seconds
    if not on_trial:
        on_main(lambda: _require_memory(sizes.model), ranks)
        store.rehearse(lambda folder: (folder / f"rank_{ranks.rank}").touch())
        return f"room for checkpoints of {format_bytes(sizes.checkpoint)}"
    written = store.rehearse(lambda folder: _tried(task.save, "a checkpoint", folder))
    try:
        write_on_main(lambda: shutil.rmtree(part, ignore_errors=True), part, "the model", ranks)
        write_together(
            lambda: _tried(task.export, "the model's export", part), model_folder, "the model", ranks
        )
        size = on_main(lambda: sum(p.stat().st_size for p in part.rglob("*") if p.is_file()), ranks)
    finally:
        if ranks.is_main:
            shutil.rmtree(part, ignore_errors=True)
    # A new optimizer has no state yet, so estimates may exceed what was written.
    actual = StateBytes(max(written, sizes.checkpoint), max(size, sizes.model))
    check(actual)
    return f"a checkpoint of {format_bytes(actual.checkpoint)} and the model of {format_bytes(actual.model)}"


def _tried(write: Callable[[Path], None], what: str, folder: Path) -> None:
    """Call `write`; errors other than failed writes become a `UserError`, which all ranks then raise."""
    try:
        write(folder)
    except Exception as error:
        if as_write_error(error, folder) is not None:
            raise
        raise UserError(
            f"rehearsal of {what} fails ({type(error).__name__}: {first_line(error)}): check model"
        ) from error


def _require_memory(model: int) -> None:
    """Check that rank 0 can hold the copy of the averaged weights that an export makes."""
    if (available := available_bytes()) < model:
        raise UserError(
            f"rehearsal of the model's export: the copy of the averaged weights needs {format_bytes(model)} "
            f"of memory, but {format_bytes(available)} are available: free memory on the machine of rank 0"
        )
