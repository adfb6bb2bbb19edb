"""Write the tables of docs/kernels.md from the committed results of the benchmarks.

    python scripts/kernel_tables.py

Tables stand between `<!-- NAME -->` and `<!-- end -->`; whatever is between them is replaced.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/kernels.md"
RESULTS = ROOT / "benchmarks/results"


def main() -> None:
    """Replace the tables in place."""
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """The document with its tables made from the results."""
    tables = {"speed": speed(_read("kernels.json")), "static": static(_read("gpu_static.json"))}
    for name, table in tables.items():
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda m, t=table: m[1] + t + m[2],
            text,
            flags=re.DOTALL,
        )
        if found != 1:
            sys.exit(f"{DOCUMENT.name} has {found} places for the table {name!r}, not one")
    return text


def speed(results: Mapping[str, Any]) -> str:
    """A row a case: milliseconds, error, and the ratios over its baselines."""
    rows = []
    for key, case in results["cases"].items():
        op, shape, which = key.split(".")
        ratios = ", ".join(f"{r['median']:.3g} × {name}" for name, r in case["ratios"].items())
        milliseconds = case["seconds"]["ours"]["median"] * 1e3
        error = f"{case['errors']['ours']:.0e}".replace("e-0", "e-")
        rows.append((f"`{op}`", shape, which.replace("_", " + "), f"{milliseconds:.3g}", ratios, error))
    return _table(("operator", "shape", "pass", "ms", "as fast as", "error"), rows)


def static(results: Mapping[str, Any]) -> str:
    """A row a kernel: registers, shared memory and occupancy on both architectures."""

    def key(row: Mapping[str, Any]) -> tuple[str, str]:
        return row["case"], row["name"]

    rows = []
    for (case, name), group in groupby(sorted(results["kernels"], key=key), key=key):
        kernels = list(group)
        worst = {
            a: max((k for k in kernels if k["architecture"] == a), key=lambda k: k["registers"])
            for a in (80, 90)
        }
        rows.append((f"`{case}`", f"`{name}`", kernels[0]["kind"], *map(_costs, worst.values())))
    return _table(("case", "kernel", "held to", "sm_80", "sm_90"), rows)


def _costs(kernel: Mapping[str, Any]) -> str:
    shared = f", {kernel['shared_bytes'] / 1024:.0f} KiB" if kernel["shared_bytes"] else ""
    matrix = ", matrix" if kernel["matrix_instructions"] else ""
    return f"{kernel['registers']} registers{shared}, {kernel['occupancy']:.0%}{matrix}"


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
