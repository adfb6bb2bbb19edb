"""Time of a training checkpoint: writing the complete state of a run, and resuming from it.

    python -m benchmarks.checkpoints --json FILE [--quick]

One rank writes the state of a tokenizer's run: weights, optimizers, averaged weights and the position in the
data. A new task reads it. Rounds alternate over the sizes; figures are medians. Files go to the temporary
folder, so the rate is that of its disk or of the page cache. `--quick` measures the nano tokenizer only.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared import simple_program
from cat_fast.processes.signals import run_command

WIDER = "model.block_out_channels=[64,128,192,256,512,512]"
SIZES: Mapping[str, tuple[str, ...]] = {"nano": (), "nano, wider": (WIDER,)}
"""Overrides of configs/tokenizer/nano.yaml."""
ROUNDS = 3


def measure(quick: bool) -> dict[str, Any]:
    """Return the bytes of a checkpoint, and the median seconds of saving and loading it, by size."""
    from cat_fast.training.runtime.ranks import start, stop

    names = list(SIZES)[:1] if quick else list(SIZES)
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    ranks = start()
    try:
        for _ in range(1 if quick else ROUNDS):
            for name in names:
                taken[name].append(save_and_load(SIZES[name], ranks))
    finally:
        stop()
    return {"checkpoints": {name: summary(rounds) for name, rounds in taken.items()}}


def save_and_load(overrides: Sequence[str], ranks: Any) -> tuple[float, float, int]:
    """Return the seconds of saving and loading a run's state, and its bytes."""
    from benchmarks.shared.configs import tokenizer_run
    from cat_fast.training.tasks import make_task

    with tempfile.TemporaryDirectory() as folder:
        config = tokenizer_run("nano", [f"output_dir={folder}/run", *overrides])
        saved = Path(folder) / "checkpoint"
        saved.mkdir()
        task = make_task(config, ranks)
        start = time.perf_counter()
        task.save(saved)
        seconds = time.perf_counter() - start
        task.close()
        size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        other = make_task(config, ranks)
        start = time.perf_counter()
        other.load(saved)
        loading = time.perf_counter() - start
        other.close()
    return seconds, loading, size


def summary(rounds: Sequence[tuple[float, float, int]]) -> dict[str, float]:
    """Return medians over rounds of (seconds of saving, seconds of loading, bytes)."""
    saving, loading, sizes = zip(*rounds, strict=True)
    size = sizes[0]
    return {
        "bytes": size,
        "save_seconds": statistics.median(saving),
        "load_seconds": statistics.median(loading),
        "save_bytes_per_second": size / statistics.median(saving),
        "load_bytes_per_second": size / statistics.median(loading),
    }


def lines(found: Mapping[str, Any]) -> Sequence[str]:
    """Format the results, one size per line."""
    return [
        f"{name}: {row['bytes'] / 1e6:.4g} MB, saved in {row['save_seconds']:.2f} s, loaded in "
        f"{row['load_seconds']:.2f} s"
        for name, row in found["checkpoints"].items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return simple_program.main("checkpoints", __doc__ or "", measure, lines, arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
