"""Command line of a benchmark without baselines: options, description of the machine, JSON."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.shared import machine
from benchmarks.shared.compact_json import write_compact
from benchmarks.shared.harness import rounded
from cat_fast import console
from cat_fast.data.files import require_writable
from cat_fast.errors import UserError


def main(
    benchmark: str,
    description: str,
    measure: Callable[[bool], Mapping[str, Any]],
    lines: Callable[[Mapping[str, Any]], Sequence[str]],
    arguments: Sequence[str] | None = None,
) -> int:
    """Measure, print and write JSON. Return 2 for invalid usage.

    Args:
        benchmark: name of the benchmark.
        description: text of --help.
        measure: returns the results; its argument is True with --quick.
        lines: formats the results as text.
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--quick", action="store_true", help="a rough answer quickly")
    given = parser.parse_args(arguments)
    try:
        if given.json:
            require_writable(given.json)
        load = os.getloadavg()[0]
        found = measure(given.quick)
    except UserError as error:
        console.print_error(error)
        return 2
    print("\n".join(lines(found)))
    if given.json:
        content = {**found, "about": about(benchmark, load, quick=given.quick)}
        write_compact(given.json, rounded(content))
    return 0


def about(benchmark: str, load_before: float, *, quick: bool = False) -> dict[str, Any]:
    """Return benchmark, date, machine, its load before and after the measurement, and whether it is rough."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **machine.describe(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        **({"quick": True} if quick else {}),
    }
