"""The process of one block of `gpu_check`.

    python3 -m benchmarks.gpu.body BLOCK --out DIR --work DIR [--dry] [--wheels DIR]

GPU_CHECK_PLANT=error=BLOCK,hang=BLOCK plants failures, to test that the results of others survive them.
"""

import argparse
import importlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks.gpu.blocks import BLOCKS
from benchmarks.gpu.record import RESULTS, Recorder

SKIP_CODE = 77
MODULES = {
    "install": "install",
    "ceilings": "ceilings",
    "build": "build",
    "compile": "steps",
    "kernel_tests": "tests",
    "shapes": "tests",
    "sanitizer": "sanitizer",
    "kernels": "kernels",
    "steps": "steps",
    "training": "training",
}
"""Modules of benchmarks.gpu whose function of the block's name is its body."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Arguments of a block's body."""

    record: Recorder
    dry: bool
    work: Path
    """Folder for logs and temporary files."""
    wheels: Path | None
    deadline: float
    """Value of time.monotonic() at the block's limit."""

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.deadline - time.monotonic()

    def skip(self, reason: str) -> NoReturn:
        """End the block as skipped."""
        print(reason, flush=True)
        sys.exit(SKIP_CODE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu.body")
    parser.add_argument("block", choices=[block.name for block in BLOCKS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--wheels", type=Path)
    given = parser.parse_args()
    planted = os.environ.get("GPU_CHECK_PLANT", "").split(",")
    if f"error={given.block}" in planted:
        raise RuntimeError("a planted error")
    if f"hang={given.block}" in planted:
        time.sleep(86_400)
    context = Context(
        record=Recorder(given.out / RESULTS, given.block, given.dry),
        dry=given.dry,
        work=given.work,
        wheels=given.wheels,
        deadline=time.monotonic() + float(os.environ.get("GPU_CHECK_SECONDS", "600")) - 2.0,
    )
    body = getattr(importlib.import_module(f"benchmarks.gpu.{MODULES[given.block]}"), given.block)
    body(context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
