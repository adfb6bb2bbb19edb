"""Regression gate: count figures that do not depend on the machine, and compare them with expected.json.

    python -m benchmarks.quick [--fast | --kernels] [--update] [--json FILE]

FLOPs, bytes, numbers of operators, graph breaks, recompiled graphs, the packer's fill, peak memory, and
registers and spills of the GPU kernels (for the listed versions of Triton). A loss of more than a kind's
tolerance makes the exit code 1, as does a figure that is new or no longer counted; an improvement asks to
update the file. Seconds are printed, not compared. `--fast` takes seconds and is also a test; all of it takes
four minutes on two cores. `--kernels` compiles the GPU kernels only, each for both architectures, with the
Triton that Python finds: CONTRIBUTING.md has the commands for another version. `--update` compiles for both
architectures too, writes the file, lists what it accepts, and exits with 0. Collectives per step are compared
by `make test` only (tests/training/test_collectives.py), which starts two ranks anyway.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gate import expected
from benchmarks.gate.expected import FAILURES, IMPROVEMENT, Finding
from benchmarks.gate.figures import FAST, SLOW
from benchmarks.static.report import kernels_of
from cat_fast import console
from cat_fast.data.files import write_json
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

ROOT = Path(__file__).parents[1]


def count(fast: bool) -> dict[str, float]:
    """Count the figures, and print the seconds of each group."""
    found: dict[str, float] = {}
    for name, group in {**FAST, **({} if fast else SLOW)}.items():
        start = time.perf_counter()
        found |= group()
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    return found


def compile_kernels(*, alternate: bool) -> tuple[list[dict[str, Any]], str]:
    """Compile the GPU kernels in another process; return their rows, and the compiler with its version.

    Args:
        alternate: compile each case for one of the architectures instead of both.

    Raises:
        UserError: a kernel does not compile, or exceeds its budget.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "static.json"
        command = [sys.executable, "-m", "benchmarks.gpu_static", "--json", str(path)]
        command += ["--alternate"] if alternate else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise UserError(f"benchmarks.gpu_static failed: {(done.stderr or done.stdout).strip()[-500:]}")
        content = json.loads(path.read_text(encoding="utf-8"))
    return kernels_of(content), f"triton {content['about']['triton']}"


def report(findings: Sequence[Finding]) -> int:
    """Print all findings that differ, and their numbers; return the exit code."""
    for verdict in (*FAILURES, IMPROVEMENT):
        for finding in findings:
            if finding.verdict == verdict:
                print(finding.line())
    print(f"{len(findings)} figures: {differences(findings)}")
    return int(any(finding.verdict in FAILURES for finding in findings))


def differences(findings: Sequence[Finding]) -> str:
    """Return the number of findings by verdict."""
    counts = Counter(finding.verdict for finding in findings)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in (*FAILURES, IMPROVEMENT))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--fast", action="store_true", help="only the part that takes seconds")
    part.add_argument("--kernels", action="store_true", help="only the GPU kernels, for both architectures")
    parser.add_argument("--update", action="store_true", help="write the figures to expected.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args(arguments)
    try:
        content = expected.read()
        found = {} if given.kernels else count(given.fast)
        complete = not (given.fast or given.kernels)
        findings = expected.compare(found, content, complete=complete)
        if not given.fast:
            start = time.perf_counter()
            rows, compiler = compile_kernels(alternate=not (given.kernels or given.update))
            print(f"kernels: {time.perf_counter() - start:.1f} s", flush=True)
            if compiler not in content["compilers"]:
                print(f"registers not compared: {expected.FILE.name} lists no {compiler}")
            findings += expected.compare_kernels(rows, compiler, content)
            if given.update:
                content["compilers"][compiler] = expected.kernel_figures(rows)
        if given.json:
            write_json(given.json, {"about": {"benchmark": "quick"}, "figures": found})
        code = report(findings)
        if given.update:
            expected.update(content, found, complete=complete)
            print(f"wrote {expected.FILE.name}; accepted: {differences(findings)}")
            return 0
        if any(finding.verdict == IMPROVEMENT for finding in findings):
            print(f"figures have improved: record them with {expected.UPDATE}")
    except UserError as error:
        console.print_error(error)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))
