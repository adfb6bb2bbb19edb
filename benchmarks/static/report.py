"""The JSON of gpu_static: one list of columns, and a row per compiled kernel."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NESTED = "instructions"
"""Column with a count per class of instructions; null where they were not counted."""


def to_report(rows: Sequence[Mapping[str, Any]], triton: str) -> dict[str, Any]:
    """Return the report of compiled kernels, which all have the same keys."""
    columns = list(rows[0]) if rows else []
    counted: Mapping[str, int] = next((row[NESTED] for row in rows if row.get(NESTED)), {})
    return {
        "about": {"benchmark": "gpu_static", "triton": triton},
        "columns": columns,
        NESTED: list(counted),
        "kernels": [[_cell(name, row[name]) for name in columns] for row in rows],
    }


def read_kernels(path: Path) -> list[dict[str, Any]]:
    """Return the compiled kernels of a file as dictionaries."""
    return kernels_of(json.loads(path.read_text(encoding="utf-8")))


def kernels_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the compiled kernels of a report as dictionaries."""
    rows = [dict(zip(report["columns"], row, strict=True)) for row in report["kernels"]]
    for row in rows:
        if row.get(NESTED) is not None:
            row[NESTED] = dict(zip(report[NESTED], row[NESTED], strict=True))
    return rows


def _cell(name: str, value: Any) -> Any:
    return list(value.values()) if name == NESTED and value is not None else value
