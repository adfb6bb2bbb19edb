"""Labelled arrays of a data set, on disk, from which a probe is trained.

inputs.npy    (N, D) float32 features, or (N, 3, H, W) uint8 images
labels.npy    (N,) int64
ratios.npy    (N,) int32, the downsampling ratio of each image; 0 without one
arrays.json   written last: class names, images left out, and the identity of their source
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat_fast.data.files import write_json
from cat_fast.errors import UserError

RECORD = "arrays.json"


@dataclass(frozen=True, kw_only=True)
class LabelledArrays:
    """Arrays of one split, mapped from their files."""

    inputs: np.ndarray
    labels: np.ndarray
    ratios: np.ndarray
    record: Mapping[str, Any]

    @property
    def classes(self) -> Sequence[str]:
        return self.record["classes"]

    def __len__(self) -> int:
        return len(self.labels)


def read_arrays(folder: Path) -> LabelledArrays:
    """Open the arrays in a folder.

    Raises:
        UserError: they are missing or incomplete.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        inputs, labels, ratios = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("inputs", "labels", "ratios")
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no labelled arrays ({error}); make them with cat-fast eval classification"
        ) from error
    return LabelledArrays(inputs=inputs, labels=labels, ratios=ratios, record=record)


def is_complete(folder: Path, source: Mapping[str, Any]) -> bool:
    """Return True if a folder contains the arrays of `source`; other arrays in it are written again."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return record.get("source") == json.loads(json.dumps(source))


@contextmanager
def writing(
    folder: Path, count: int, shape: Sequence[int], dtype: Any, source: Mapping[str, Any]
) -> Iterator["ArrayWriter"]:
    """Write arrays of at most `count` images, and their record at the end.

    Raises:
        UserError: they cannot be written, such as on a full disk; no image is read then.
    """
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)
        writer = ArrayWriter(folder, count, shape, dtype)
    yield writer
    with _writable(folder):
        writer.finish(source)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error


class ArrayWriter:
    """Rows of the arrays, appended one by one."""

    def __init__(self, folder: Path, count: int, shape: Sequence[int], dtype: Any) -> None:
        self.folder = folder
        self.classes: Sequence[str] = ()
        self.skipped: list[dict[str, str]] = []
        """Images left out: {"name", "why"}."""
        part = folder / ".inputs.part.npy"
        self._inputs = np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=(count, *shape))
        try:
            with part.open("rb+") as file:  # a full disk would end the process at a page of the map
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        except OSError:
            part.unlink()
            raise
        self._labels: list[int] = []
        self._ratios: list[int] = []

    def add(self, value: np.ndarray, label: int, ratio: int) -> None:
        self._inputs[len(self._labels)] = value
        self._labels.append(label)
        self._ratios.append(ratio)

    def finish(self, source: Mapping[str, Any]) -> None:
        used = len(self._labels)
        if not used:
            raise UserError(f"{self.folder}: no image could be used; {self.skipped[:1]}")
        part = self.folder / ".inputs.part.npy"
        if used < len(self._inputs):
            np.save(self.folder / "inputs.npy", self._inputs[:used])
            part.unlink()
        else:
            self._inputs.flush()
            part.replace(self.folder / "inputs.npy")
        np.save(self.folder / "labels.npy", np.array(self._labels, np.int64))
        np.save(self.folder / "ratios.npy", np.array(self._ratios, np.int32))
        record = {"classes": list(self.classes), "skipped": self.skipped, "source": source}
        write_json(self.folder / RECORD, record)
