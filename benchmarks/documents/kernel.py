"""Tables of docs/kernels.md from the committed results of the benchmarks."""

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from benchmarks.documents import tables
from benchmarks.shared.committed import committed
from benchmarks.static.report import read_kernels

DOCUMENT = tables.ROOT / "docs/kernels.md"


def filled(text: str) -> str:
    """Return the document with tables made from the results."""
    made = {
        "speed": speed(tables.results("kernels")),
        "static": static(read_kernels(committed("gpu_static"))),
    }
    return tables.fill(text, made)


def speed(results: Mapping[str, Any]) -> str:
    """Return one row per case: milliseconds, error, and speed-up over each baseline."""
    rows = []
    for key, case in results["cases"].items():
        op, shape, which = key.split(".")
        ratios = ", ".join(f"{r['median']:.3g} × {name}" for name, r in case["ratios"].items())
        milliseconds = case["seconds"]["ours"]["median"] * 1e3
        error = f"{case['errors']['ours']:.0e}".replace("e-0", "e-")
        rows.append((f"`{op}`", shape, which.replace("_", " + "), f"{milliseconds:.3g}", ratios, error))
    return tables.markdown(("operator", "shape", "pass", "ms", "as fast as", "error"), rows)


def static(compiled: Iterable[Mapping[str, Any]]) -> str:
    """Return one row per kernel: registers, shared memory and occupancy on both architectures."""

    def key(row: Mapping[str, Any]) -> tuple[str, str]:
        return row["case"], row["name"]

    rows = []
    for (case, name), group in groupby(sorted(compiled, key=key), key=key):
        kernels = list(group)
        worst = {
            a: max((k for k in kernels if k["architecture"] == a), key=lambda k: k["registers"])
            for a in (80, 90)
        }
        rows.append((f"`{case}`", f"`{name}`", kernels[0]["kind"], *map(_costs, worst.values())))
    return tables.markdown(("case", "kernel", "held to", "sm_80", "sm_90"), rows)


def _costs(kernel: Mapping[str, Any]) -> str:
    shared = f", {kernel['shared_bytes'] / 1024:.0f} KiB" if kernel["shared_bytes"] else ""
    matrix = ", matrix" if kernel["matrix_instructions"] else ""
    return f"{kernel['registers']} registers{shared}, {kernel['occupancy']:.0%}{matrix}"
