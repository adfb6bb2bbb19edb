"""A nano run in a process of its own, on any device, with the arguments and the losses of a golden file.

    python -m benchmarks.gpu.golden_run KIND RUN LATENTS [key=value …]

trains one rank on random numbers of the CPU, without TF32, so that a GPU has the CPU's losses.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/training/golden"
FILES = {"tokenizer": "tokenizer_without_perceptual", "generator": "generator"}
"""Golden files of the runs; the check's machine has no weights of a perceptual distance."""
TOLERANCE = 1e-3
"""Largest relative difference of a loss."""

Steps = Sequence[Mapping[str, float]]


def golden(kind: str) -> dict[str, Any]:
    """Return the golden file of `tokenizer` or `generator`: arguments and losses per step."""
    return json.loads((GOLDEN / f"{FILES[kind]}.json").read_text())


def differences(kind: str, found: Steps) -> list[str]:
    """Describe the losses that differ from the golden file by more than `TOLERANCE`."""
    expected = golden(kind)["steps"]
    lines = [] if len(found) == len(expected) else [f"expected {len(expected)} steps, got {len(found)}"]
    return lines + [
        f"step {step}: {name}: expected {value!r}, got {losses.get(name)!r}"
        for step, (losses, terms) in enumerate(zip(found, expected, strict=False))
        for name, value in terms.items()
        if not math.isclose(losses.get(name, math.nan), value, rel_tol=TOLERANCE, abs_tol=1e-6)
    ]


def largest_difference(kind: str, found: Steps) -> float:
    """Return the largest relative difference of a loss from the golden file."""
    return max(
        abs(losses[name] - value) / max(abs(value), 1e-6)
        for losses, terms in zip(found, golden(kind)["steps"], strict=False)
        for name, value in terms.items()
    )


def command(kind: str, run: Path, latents: Path, *more: str) -> list[str]:
    """Return the command line of a run."""
    return [sys.executable, "-m", "benchmarks.gpu.golden_run", kind, str(run), str(latents), *more]


def environment() -> dict[str, str]:
    """Return the environment of a run: no TF32 in any library."""
    return {**os.environ, "NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "1"}


def train(kind: str, run: Path, latents: Path, *more: str) -> list[dict[str, float]]:
    """Train in a process of its own; return the losses of each step.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    ran = subprocess.run(
        command(kind, run, latents, *more),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"{kind}: exit code {ran.returncode}: {ran.stdout[-3000:]}")
    return read_losses(run)


def read_losses(run: Path) -> list[dict[str, float]]:
    """Return the losses of each step of a run, without weighted terms and terms per ratio."""
    from cat_fast.training.metrics.run_log import read_metrics

    return [
        {
            name: value
            for name, value in record.items()
            if name == "loss" or (f"weighted/{name}" in record and not re.search(r"_\d+x$", name))
        }
        for record in read_metrics(run)
    ]


def main(kind: str, run: str, latents: str, *more: str) -> int:
    from benchmarks.gpu.cpu_random import CpuRandomness
    from cat_fast.train import main as train_main

    config, *overrides = golden(kind)["arguments"]
    # the files are those of eager runs, and a compilation takes longer than the run
    data = [f"data.latents={latents}", "compile=false"] if kind == "generator" else []
    with CpuRandomness():
        return train_main([config, *overrides, f"output_dir={run}", *data, *more])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
