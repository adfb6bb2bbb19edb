"""Atomic checkpoints.

A checkpoint is written under a temporary name and its files are flushed. Then a manifest of their sizes and
hashes is added, and the folder is renamed. A process killed at any moment leaves either the old state or the
new one. A folder that is damaged later does not match its manifest; it is skipped and renamed.

All ranks write their files before training continues. Rank 0 flushes, hashes and renames them on a background
thread while the next steps run, as this does not touch the training state.
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
    """Checkpoints of one run: `folder/step_00001000` and so on, of which the newest `keep_last` are kept."""

    def __init__(self, folder: str | Path, ranks: Ranks, keep_last: int = 2) -> None:
        self.folder = Path(folder)
        self.ranks = ranks
        self.keep_last = keep_last
        self._sealing: threading.Thread | None = None
        self._failure: UserError | None = None

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Save a checkpoint: every rank writes now, rank 0 seals it on a background thread.

        Collective: every rank must call it. Waits until the previous checkpoint is sealed.

        Args:
            write: called on every rank with the same temporary folder.

        Raises:
            SharedError: on every rank, if one cannot write (disk full, read-only folder) or sealing the
                previous checkpoint failed. No partial checkpoint is left; existing ones are unchanged.
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
        """Error of the background thread, once it has failed; on rank 0 only."""
        return self._failure

    def wait(self) -> None:
        """Wait until the last checkpoint is complete under its final name.

        Collective: every rank must call it.

        Raises:
            SharedError: sealing it failed.
        """
        self.join()
        raise_together(self._failure, self.ranks)

    def join(self) -> None:
        """Wait for this rank's thread and ignore its error. Not collective."""
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None

    def latest(self) -> tuple[int, Path] | None:
        """Return step and folder of the newest valid checkpoint, or None if there are no checkpoints.

        Collective: every rank must call it. Newer checkpoints that are damaged are renamed to
        `damaged_step_…`.

        Raises:
            SharedError: there are checkpoints, but none is valid.
        """
        step = on_main(self._newest_valid, self.ranks)
        return None if step is None else (step, self.folder / f"step_{step:08d}")

    def _seal(self, part: Path, final: Path) -> None:
        """Seal a checkpoint on the background thread; `wait` and `save` re-raise its error."""
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

    def _newest_valid(self) -> int | None:
        damaged: list[tuple[Path, str]] = []
        for folder in reversed(checkpoints_in(self.folder)):
            damage = find_damage(folder)
            if damage is None:
                for other, reason in damaged:
                    warnings.warn(f"skipping damaged checkpoint {other}: {reason}", stacklevel=2)
                    _mark_damaged(other)
                return int(folder.name.removeprefix("step_"))
            damaged.append((folder, damage))
        if damaged:
            newest, damage = damaged[0]
            raise UserError(
                f"{self.folder}: none of its {len(damaged)} checkpoints is valid; the newest, {newest.name}, "
                f"is damaged: {damage}. Restore a valid one, or start over with checkpoint.resume=never"
            )
        return None

    def _prune(self) -> None:
        for folder in checkpoints_in(self.folder)[: -self.keep_last]:
            shutil.rmtree(folder, ignore_errors=True)
        for leftover in self.folder.glob(".step_*.part"):
            shutil.rmtree(leftover, ignore_errors=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the folders with the name of a checkpoint, oldest first."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def seal(folder: Path) -> None:
    """Flush every file of `folder` to disk and add the manifest, which marks the checkpoint as complete."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1))
    _fsync(manifest)
    _fsync(folder)


def find_damage(folder: Path) -> str | None:
    """Return a description of the first damage to a checkpoint folder, or None if it is valid."""
    try:
        files = {
            name: (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in json.loads((folder / MANIFEST).read_text())["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is missing or invalid"
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name}: expected {size} bytes, got {path.stat().st_size}"
            if sha256(path) != digest:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def _mark_damaged(folder: Path) -> None:
    """Rename a damaged checkpoint so that it no longer counts; errors are ignored."""
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
