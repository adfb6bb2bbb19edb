"""What the GPU kernels cost before they run: registers, spills, shared memory, instructions.

    python -m benchmarks.gpu_static --json FILE [--only TEXT] [--alternate]

No GPU is needed. The launchers of benchmarks/static/cases are given tensors that have shapes but no memory,
and each Triton kernel that they would launch is compiled, with the very arguments, warps and stages of the
launch, for sm_80 (A100) and sm_90 (H100). Each kernel is held to the budget of its kind; one over budget ends
the program with exit code 1. The CUDA C++ kernels are held to theirs by tests/kernels/test_cuda_binary.py.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile

from benchmarks.static.cases import CASES
from benchmarks.static.compiler import compile_launched
from cat_fast.data.files import atomic_write

ARCHITECTURES = (80, 90)


def measure(key: str, architecture: int) -> list[dict[str, Any]]:
    """The rows of one case: each kernel's costs, the kind it is held to, and what it breaks."""
    case, rows = CASES[key], []
    for kernel in compile_launched(case.launch, architecture):
        budget = case.budgets[kernel.name]
        rows.append(
            {"case": key, **asdict(kernel), "kind": budget.kind, "violations": budget.violations(kernel)}
        )
    launched = {row["name"] for row in rows}
    if missing := set(case.budgets) - launched:
        raise ValueError(f"{key} launches no {', '.join(sorted(missing))}")
    return rows


def alternating(keys: Sequence[str]) -> list[tuple[str, int]]:
    """One architecture per case, such that cases of the same kernels take the architectures in turn."""
    seen: Counter[frozenset[str]] = Counter()
    jobs = []
    for key in keys:
        kernels = frozenset(CASES[key].budgets)
        jobs.append((key, ARCHITECTURES[seen[kernels] % len(ARCHITECTURES)]))
        seen[kernels] += 1
    return jobs


def main() -> int:
    """Compile all cases, print a line a kernel, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", default="", help="only the cases whose key contains this text")
    parser.add_argument(
        "--alternate", action="store_true", help="each case for one architecture, in turn: half the time"
    )
    arguments = parser.parse_args()
    chosen = [key for key in CASES if arguments.only in key]
    jobs = alternating(chosen) if arguments.alternate else [(key, a) for key in chosen for a in ARCHITECTURES]
    rows = []
    with ProcessPoolExecutor(max_workers=min(len(os.sched_getaffinity(0)), max(1, len(jobs)))) as pool:
        for found in pool.map(measure, *zip(*jobs, strict=True)):
            for row in found:
                rows.append(row)
                print(line(row), flush=True)
    if arguments.json is not None:
        report = {"about": {"triton": version("triton")}, "kernels": rows}
        with atomic_write(arguments.json) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")
    broken = [row for row in rows if row["violations"]]
    print(f"{len(rows)} kernels compiled, {len(broken)} over budget")
    return 1 if broken else 0


def line(row: Mapping[str, Any]) -> str:
    """A row as text."""
    verdict = "; ".join(row["violations"]) or "ok"
    return (
        f"{row['case']:<44} {row['name']:<28} sm_{row['architecture']}  {row['registers']:>3} registers  "
        f"{row['shared_bytes'] / 1024:>5.1f} KiB shared  {row['occupancy']:>4.0%} occupancy  {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
