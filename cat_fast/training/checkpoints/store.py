"""Checkpoints that are whole or not there.

A checkpoint is written under a temporary name, its files are flushed, a manifest of their sizes and hashes is
added, and the folder is renamed. A process killed at any moment leaves either the old state or the new one;
a folder that was damaged later fails its manifest, and is passed over and set aside.

All ranks write their files before training goes on. Flushing, hashing and renaming touch those files alone,
no state of the training, so rank 0 does them on a thread while the next steps run.
"""

import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cat_fast.data.files import sha256
from cat_fast.errors import UserError
from cat_fast.training.checkpoints.write_errors import as_write_error, write_together
from cat_fast.training.runtime.collective_errors import on_main, raise_together
from cat_fast.training.runtime.ranks import Ranks

MANIFEST = "manifest.json"


class CheckpointStore:
    """The checkpoints of one run, `folder/step_00001000`, newest last."""

    def __init__(self, folder: str | Path, ranks: Ranks, keep_last: int = 2) -> None:
        self.folder = Path(folder)
        self.ranks = ranks
        self.keep_last = keep_last
        self._sealing: threading.Thread | None = None
        self._failure: UserError | None = None

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Collective: every rank calls `write` with the same temporary folder; rank 0 makes it final later.

        One checkpoint is sealed at a time: a save waits for the one before it. `wait` makes sure.

        Raises:
            SharedError: on every rank, where one cannot write (disk full, read-only folder) or the sealing of
                the checkpoint before failed. Nothing half-written is left, and what was whole still is.
        """
        self.wait()
        final = self.folder / f"step_{step:08d}"
        part = self.folder / f".{final.name}.part"
        on_main(lambda: _make_empty(part), self.ranks)
        try:
            write_together(lambda: write(part), part, "a checkpoint", self.ranks)
        except UserError:
            if self.ranks.is_main:
                shutil.rmtree(part, ignore_errors=True)
            raise
        if self.ranks.is_main:
            self._sealing = threading.Thread(target=self._seal, args=(part, final), name="seal checkpoint")
            self._sealing.start()

    @property
    def failure(self) -> UserError | None:
        """Why sealing failed, as soon as it has; on rank 0 only."""
        return self._failure

    def wait(self) -> None:
        """Collective: until the last checkpoint is whole under its name.

        Raises:
            SharedError: it could not be made so.
        """
        self.join()
        raise_together(self._failure, self.ranks)

    def join(self) -> None:
        """Wait for this rank's thread, whatever comes of it; not collective."""
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint, on all ranks; None if there is none at all.

        Damaged ones that are newer get a name that counts no more, `damaged_step_…`.

        Raises:
            SharedError: there are checkpoints, and none of them is whole.
        """
        step = on_main(self._newest_whole, self.ranks)
        return None if step is None else (step, self.folder / f"step_{step:08d}")

    def _seal(self, part: Path, final: Path) -> None:
        """Runs on a thread, which has nobody to raise to."""
        try:
            seal(part)
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            _fsync(self.folder)
            self._prune()
        except Exception as error:
            shutil.rmtree(part, ignore_errors=True)
            self._failure = as_write_error(error, part) or UserError(
                f"{final}: the checkpoint could not be completed ({type(error).__name__}: {error})"
            )

    def _newest_whole(self) -> int | None:
        damaged: list[tuple[Path, str]] = []
        for folder in reversed(checkpoints_in(self.folder)):
            damage = find_damage(folder)
            if damage is None:
                for other, why in damaged:
                    warnings.warn(f"checkpoint {other} is passed over: {why}", stacklevel=2)
                    _set_aside(other)
                return int(folder.name.removeprefix("step_"))
            damaged.append((folder, damage))
        if damaged:
            newest, damage = damaged[0]
            raise UserError(
                f"{self.folder}: none of its {len(damaged)} checkpoints is whole; of the newest, "
                f"{newest.name}, {damage}. Put a whole one there, or start over with checkpoint.resume=never"
            )
        return None

    def _prune(self) -> None:
        for folder in checkpoints_in(self.folder)[: -self.keep_last]:
            shutil.rmtree(folder, ignore_errors=True)
        for leftover in self.folder.glob(".step_*.part"):
            shutil.rmtree(leftover, ignore_errors=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders that are named as checkpoints are, oldest first."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def seal(folder: Path) -> None:
    """Flush every file of `folder` to disk and add the manifest that makes it a whole checkpoint."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1))
    _fsync(manifest)
    _fsync(folder)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if it is whole."""
    try:
        files = {
            name: (int(one["bytes"]), str(one["sha256"]))
            for name, one in json.loads((folder / MANIFEST).read_text())["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "it has no readable manifest"
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, {size} were written"
            if sha256(path) != digest:
                return f"{name} does not have the contents that were written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def _set_aside(folder: Path) -> None:
    """Out of the count of those to keep; where that cannot be written, it is passed over again next time."""
    with suppress(OSError):
        shutil.rmtree(folder.with_name(f"damaged_{folder.name}"), ignore_errors=True)
        folder.rename(folder.with_name(f"damaged_{folder.name}"))


def _make_empty(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise as_write_error(error, folder) or error from error


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
