"""compute-sanitizer on one small call of each operator in CUDA C++.

    python3 -m benchmarks.gpu.sanitizer OPERATOR …

runs these calls, forward and backward.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.blocks import CUDA_OPERATORS, TOOLS
from benchmarks.gpu.body import Context
from benchmarks.gpu.operators import SIZES
from cat_fast.hardware import run_device_type

ROOT = Path(__file__).parents[2]


def sanitizer(context: Context) -> None:
    """Record the number of errors of memcheck and racecheck; skip if the tool is missing or refuses."""
    if context.dry:  # the calls run, without the tool
        for op in CUDA_OPERATORS:
            call(op)
        context.skip("a dry run has no GPU for compute-sanitizer")
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        context.skip("compute-sanitizer is not installed")
    refused, wrong = None, []
    for check in TOOLS:  # one process for all operators: importing torch takes most of the time
        ran = subprocess.run(
            [tool, "--tool", check, sys.executable, "-m", "benchmarks.gpu.sanitizer", *CUDA_OPERATORS],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=max(1.0, context.left),
            check=False,
        )
        print(ran.stdout[-4000:], ran.stderr[-2000:], flush=True)
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", ran.stdout + ran.stderr)
        if summary is None:
            refused = _reason(ran.stdout + ran.stderr)
            context.record.skipped(f"{check}_errors", refused)
            continue
        context.record.figure(f"{check}_errors", int(summary[1]), "errors")
        if int(summary[1]) or ran.returncode:
            wrong.append(check)
    if wrong:
        raise RuntimeError(f"errors by {', '.join(wrong)}: see the log")
    if refused is not None:
        context.skip(refused)


def environment() -> dict[str, str]:
    """Return the environment of the calls: kernels in CUDA C++, and an allocation per tensor.

    The caching allocator places tensors within large blocks, in which no access is out of bounds.
    """
    forced = ",".join(f"{op}=cuda" for op in CUDA_OPERATORS)
    return {**os.environ, "CAT_FAST_BACKEND": forced, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def call(op: str) -> None:
    """Run an operator once on inputs that no tile divides, and check that its results are finite."""
    device = torch.device(run_device_type())
    results = SIZES["odd"][op](device, torch.float32).forward_backward()
    assert all(torch.isfinite(result).all() for result in results)


def _reason(output: str) -> str:
    lines = [line.strip("= ").strip() for line in output.splitlines() if line.strip("= ")]
    return lines[-1][:300] if lines else "compute-sanitizer printed nothing"


if __name__ == "__main__":
    for operator in sys.argv[1:]:
        call(operator)
