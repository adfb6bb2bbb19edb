"""Disk space that a run's checkpoints and its exported model need."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from cat_fast.errors import UserError
from cat_fast.training.checkpoints.store import checkpoints_in
from cat_fast.training.config.settings import RunConfig


@dataclass(frozen=True)
class StateBytes:
    """Sizes of one checkpoint and of the exported model, in bytes over all ranks."""

    checkpoint: int
    model: int


def require_space(config: RunConfig, checkpoints: Path, sizes: StateBytes, first: int) -> None:
    """Check that the disk has room for what a run that continues at step `first` writes.

    At most `keep_last` checkpoints and the one that is being written exist at a time, and the model is
    written once only `keep_last` are left.

    Raises:
        UserError: there is too little space.
    """
    folder = checkpoints.parent
    existing = len(checkpoints_in(checkpoints))
    steps = config.schedule.total_steps
    new = steps // config.checkpoint.every_steps - first // config.checkpoint.every_steps
    new = max(1, new + (steps % config.checkpoint.every_steps > 0))
    keep = config.checkpoint.keep_last
    while_saving = max(1, min(existing + new, keep + 1) - existing) * sizes.checkpoint
    while_exporting = max(0, min(existing + new, keep) - existing) * sizes.checkpoint + sizes.model
    needed, free = max(while_saving, while_exporting), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"output_dir: {folder} has {format_bytes(free)} free, but this run needs {format_bytes(needed)} "
            f"for checkpoints of {format_bytes(sizes.checkpoint)} (checkpoint.keep_last={keep}, and one more "
            f"while it is written) and a model of {format_bytes(sizes.model)}: free space, choose another "
            "output_dir, or lower checkpoint.keep_last"
        )


def format_bytes(size: float) -> str:
    """Return a size in MiB or GiB with three significant digits."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
