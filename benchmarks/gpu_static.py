"""Static costs of the GPU kernels: registers, spills, shared memory, instructions.

    python -m benchmarks.gpu_static --json FILE [--only TEXT] [--alternate]

No GPU is needed. The launchers of benchmarks/static/cases run with tensors that have shapes but no memory.
Each Triton kernel that they would launch is compiled, with the arguments, warps and stages of that launch,
for sm_80 (A100) and sm_90 (H100), and checked against the budget of its kind. A kernel over budget makes the
exit code 1. tests/kernels/test_cuda_binary.py checks the CUDA C++ kernels.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

from benchmarks.shared.compact_json import write_compact
from benchmarks.static.budgets import tolerated_spills
from benchmarks.static.cases import CASES
from benchmarks.static.compiler import compile_launched
from benchmarks.static.report import to_report
from cat_fast import console
from cat_fast.data.files import require_writable
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command
from cat_fast.processes.worker import follow_parent

ARCHITECTURES = (80, 90)


def measure(key: str, architecture: int, count_all: bool) -> list[dict[str, Any]]:
    """Return the rows of one case: each kernel's costs, the kind of its budget, and the violations.

    Without `count_all`, instructions are counted only of kernels whose budget depends on them.
    """
    case, rows = CASES[key], []
    spills = tolerated_spills(version("triton"))
    reads_code = (lambda name: True) if count_all else (lambda name: case.budgets[name].reads_code)
    for kernel in compile_launched(case.launch, architecture, reads_code):
        budget = case.budgets[kernel.name]
        rows.append(
            {
                "case": key,
                **asdict(kernel),
                "kind": budget.kind,
                "violations": budget.violations(kernel, spills),
            }
        )
    launched = {row["name"] for row in rows}
    if missing := set(case.budgets) - launched:
        raise ValueError(f"{key} launches no {', '.join(sorted(missing))}")
    return rows


def alternating(keys: Sequence[str]) -> list[tuple[str, int]]:
    """Return one architecture per case; cases of the same kernels alternate between architectures."""
    seen: Counter[frozenset[str]] = Counter()
    jobs = []
    for key in keys:
        kernels = frozenset(CASES[key].budgets)
        jobs.append((key, ARCHITECTURES[seen[kernels] % len(ARCHITECTURES)]))
        seen[kernels] += 1
    return jobs


def main(given: Sequence[str] | None = None) -> int:
    """Compile all cases, print one line per kernel, and write the JSON. Return 2 for invalid usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--only", default="", help="only the cases whose key contains this text")
    parser.add_argument(
        "--alternate",
        action="store_true",
        help="one architecture per case, alternating; instructions only where a budget needs them",
    )
    arguments = parser.parse_args(given)
    chosen = [key for key in CASES if arguments.only in key]
    try:
        if not chosen:
            known = ", ".join(sorted({key.split(".")[0] for key in CASES}))
            raise UserError(f"--only {arguments.only}: no case matches; cases start with {known}")
        if arguments.json is not None:
            require_writable(arguments.json)
    except UserError as error:
        console.print_error(error)
        return 2
    jobs = alternating(chosen) if arguments.alternate else [(key, a) for key in chosen for a in ARCHITECTURES]
    rows = []
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    with ProcessPoolExecutor(workers, initializer=follow_parent) as pool:
        for found in pool.map(partial(measure, count_all=not arguments.alternate), *zip(*jobs, strict=True)):
            for row in found:
                rows.append(row)
                print(line(row), flush=True)
    if arguments.json is not None:
        write_compact(arguments.json, to_report(rows, version("triton")))
    broken = [row for row in rows if row["violations"]]
    print(f"{len(rows)} kernels compiled, {len(broken)} over budget")
    return 1 if broken else 0


def line(row: Mapping[str, Any]) -> str:
    """Format a row as text."""
    verdict = "; ".join(row["violations"]) or "ok"
    return (
        f"{row['case']:<44} {row['name']:<28} sm_{row['architecture']}  {row['registers']:>3} registers  "
        f"{row['shared_bytes'] / 1024:>5.1f} KiB shared  {row['occupancy']:>4.0%} occupancy  {verdict}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
