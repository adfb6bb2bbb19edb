"""Checkpoints that are whole or not there.

A checkpoint is written under a temporary name, its files are flushed, a manifest of their sizes and hashes is
added, and the folder is renamed. A process killed at any moment leaves either the old state or the new one;
a folder that was damaged later fails its manifest and is passed over.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from cat_fast.training.distributed import Ranks

MANIFEST = "manifest.json"


class CheckpointStore:
    """The checkpoints of one run, `folder/step_00001000`, newest last."""

    def __init__(self, folder: str | Path, ranks: Ranks, keep_last: int = 2) -> None:
        self.folder = Path(folder)
        self.ranks = ranks
        self.keep_last = keep_last

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Collective: every rank calls `write` with the same temporary folder; rank 0 makes it final."""
        final = self.folder / f"step_{step:08d}"
        part = self.folder / f".{final.name}.part"
        if self.ranks.is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.ranks.barrier()
        write(part)
        self.ranks.barrier()
        if self.ranks.is_main:
            seal(part)
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            _fsync(self.folder)
            self._prune()
        self.ranks.barrier()

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint, on all ranks; damaged ones are passed over."""
        found = self._newest_whole() if self.ranks.is_main else None
        step = self.ranks.broadcast(found)
        return None if step is None else (step, self.folder / f"step_{step:08d}")

    def _newest_whole(self) -> int | None:
        for folder in reversed(self._folders()):
            damage = find_damage(folder)
            if damage is None:
                return int(folder.name.removeprefix("step_"))
            warnings.warn(f"checkpoint {folder} is passed over: {damage}", stacklevel=2)
        return None

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step_*")) if self.folder.is_dir() else []

    def _prune(self) -> None:
        for folder in self._folders()[: -self.keep_last]:
            shutil.rmtree(folder, ignore_errors=True)
        for leftover in self.folder.glob(".step_*.part"):
            shutil.rmtree(leftover, ignore_errors=True)


def seal(folder: Path) -> None:
    """Flush every file of `folder` to disk and add the manifest that makes it a whole checkpoint."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1))
    _fsync(manifest)
    _fsync(folder)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "it has no readable manifest"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
        if _sha256(path) != expected["sha256"]:
            return f"{name} does not have the contents that were written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
