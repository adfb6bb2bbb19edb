"""The library of a run's fp32 products on CPUs: chosen at its start, kept when it resumes."""

import json
from pathlib import Path

from cat_fast.errors import UserError
from cat_fast.hardware import run_device_type
from cat_fast.kernels.linear.op import DEFAULT, require, resolve
from cat_fast.training.runtime.collective_errors import on_each, on_main
from cat_fast.training.runtime.ranks import Ranks

RECORD = "linear_backend.json"
"""File of a run and of each of its checkpoints: the setting and the library."""


def settle(setting: str, checkpoint: Path | None, ranks: Ranks) -> str:
    """Return the library for a run: that of its checkpoint, or at its start the one for `setting`.

    Collective: every rank must call it. Rank 0 decides.

    Args:
        setting: `linear_backend` of the configuration.
        checkpoint: folder to resume from. One without a record was trained with torch's default.

    Raises:
        UserError: the setting names another library than the checkpoint, or one that is not available.
    """
    name = on_main(lambda: _choose(setting, checkpoint), ranks)
    return on_each(lambda: require(name), ranks)


def record(setting: str, backend: str, folder: Path) -> None:
    """Write the record into a folder."""
    text = json.dumps({"setting": setting, "backend": backend})
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def _choose(setting: str, checkpoint: Path | None) -> str:
    if checkpoint is None:
        return resolve(setting) if run_device_type() == "cpu" else DEFAULT
    path = checkpoint / RECORD
    before = json.loads(path.read_text(encoding="utf-8"))["backend"] if path.is_file() else DEFAULT
    if setting not in ("auto", before):
        raise UserError(
            f"linear_backend: expected {before!r} or 'auto', as at the start of the run, got {setting!r}: the"
            " libraries round differently; restore the setting, or start a new run in another output_dir"
        )
    return before
