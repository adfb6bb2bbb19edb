"""Versions, time and machine of a result, and the split of a data set by its path."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cat_fast.processor import processor_name

PACKAGES = ("cat-fast", "torch", "torchvision", "numpy", "pillow", "transformers", "lpips", "pytesseract")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "held_out", "heldout", "dev"),
    "test": ("test", "testing"),
}


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return the machine of a timing."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"processor": processor_name(), "threads": torch.get_num_threads(), "gpus": gpus}


class Stopwatch:
    """Wall and CPU time since its construction, the latter with all processes that ended meanwhile."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def record(self) -> dict[str, Any]:
        """Return both times and the machine, for the `timing` of a result."""
        return {
            "seconds": round(time.perf_counter() - self._wall, 2),
            "cpu_seconds": round(_cpu_seconds() - self._cpu, 2),
            **machine(),
        }


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def split_of(path: Path) -> str:
    """Return the split that a folder or file name in `path` gives: train, validation, test or unknown.

    The last name counts, so `data/train/val2017` is validation.
    """
    parts = path.resolve().parts
    for part in reversed(parts[2:] if parts[:2] == ("/", "dev") else parts):  # not /dev/shm
        stem = Path(part).stem.lower().replace("-", "_")
        words = stem.split("_")
        names = {stem, *words, *(word.rstrip("0123456789") for word in words)}
        for split, known in _SPLITS.items():
            if names & set(known):
                return split
    return "unknown"
