"""Blocks that run tests: those of the operators, and those of a GPU's size, streams and repeats."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.body import Context

ROOT = Path(__file__).parents[2]
WORKERS = 8
DRY_KERNELS = ["tests/kernels/test_pack.py", "-k", "triton"]
"""A few interpreted cases stand for all tests of operators."""


def kernel_tests(context: Context) -> None:
    """Run the tests of all operators on the GPU, and the tests of models, sampling and encoding."""
    inference = ["tests/inference/engine/test_bits.py", "tests/inference/pipeline/test_diffusers_api.py"]
    paths = ["tests/kernels", "tests/gpu/test_models.py", *inference, "-m", "gpu"]
    _run(context, DRY_KERNELS if context.dry else paths, workers=0 if context.dry else WORKERS)


def shapes(context: Context) -> None:
    """Run the tests of sizes, of which some need most of the memory, one after another."""
    _run(context, ["tests/gpu/test_kernels.py", "-m", "not gpu" if context.dry else "gpu"], workers=0)


def _run(context: Context, arguments: list[str], workers: int) -> None:
    """Run pytest; record the numbers of passed, failed and skipped tests even if it is killed later."""
    counts = context.work / f"{context.record.block}_outcomes"
    options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_outcomes"]
    if workers:
        options += ["--numprocesses", str(workers), "--dist", "worksteal"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=ROOT,
        env={**os.environ, "GPU_CHECK_OUTCOMES": str(counts), "PYTHONPATH": str(ROOT)},
    )
    try:
        code = process.wait(max(1.0, context.left))
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    outcomes = counts.read_text().splitlines() if counts.exists() else []
    for outcome in ("passed", "failed", "skipped"):
        found = [line.partition(" ")[2] for line in outcomes if line.startswith(f"{outcome} ")]
        details = {"names": found[:50]} if outcome == "failed" else {}
        context.record.figure(outcome, len(found), "tests", **details)
    if code is None:
        raise TimeoutError(f"the tests did not end; {len(outcomes)} ended before the limit")
    if code == 5:
        context.skip("no test was selected")
    if code:
        failed = [line.partition(" ")[2] for line in outcomes if line.startswith("failed ")]
        raise RuntimeError(f"{len(failed)} tests failed, such as {', '.join(failed[:3]) or 'at collection'}")
