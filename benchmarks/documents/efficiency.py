"""Tables of docs/efficiency.md from the committed claims, bounds and simulations."""

from collections.abc import Mapping
from typing import Any

from benchmarks import roofline, scaling
from benchmarks.documents import tables
from benchmarks.efficiency.row import counted_cell, measured_cell

DOCUMENT = tables.ROOT / "docs/efficiency.md"
GROUPS = ("tokens", "transformer", "tokenizer", "scoring")
COLUMNS = ("8x", "16x", "32x", "CAT")


def filled(text: str) -> str:
    """Return the document with updated tables."""
    counted = tables.results("claims")
    bounds = tables.results("roofline")
    kernels, steps = "\n".join(roofline.lines(bounds)).split("\n\n")
    made = {
        **{name: claims(counted["claims"][name]) for name in GROUPS},
        "fixed": comparison(counted["comparison"]),
        "kernels": kernels + "\n",
        "steps": steps + "\n",
        "compiled": "\n".join(roofline.compiled_lines(bounds)) + "\n",
        "validation": validation(tables.results("scaling_validation")),
        "scaling": "\n".join(scaling.lines(chosen(tables.results("scaling")))) + "\n",
    }
    return tables.fill(text, made)


def claims(rows: list[Mapping[str, Any]]) -> str:
    """Return one row per claim: published, counted, measured and the reason of a difference."""
    cells = [
        (
            row["claim"],
            row["unit"],
            f"{row['published']}",
            counted_cell(row),
            measured_cell(row["measured"]),
            row["explanation"],
        )
        for row in rows
    ]
    return tables.markdown(("claim", "unit", "published", "counted", "measured", "difference"), cells)


def comparison(uses: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return memory and time per image by use, for fixed ratios and CAT's mix."""
    rows = [
        (use, figure, *(f"{figures[name]:,.4g}" if name in figures else "" for name in COLUMNS))
        for use, by_figure in uses.items()
        for figure, figures in by_figure.items()
    ]
    return tables.markdown(("use", "per image", "fixed 8x", "fixed 16x", "fixed 32x", "CAT"), rows)


def validation(results: Mapping[str, Any]) -> str:
    """Return predicted and measured milliseconds of steps on two processes, one row per configuration."""
    rows = [
        (
            row["model"],
            row["configuration"],
            f"{row['stage']}",
            f"{row['predicted'] * 1e3:.1f}",
            f"{row['measured'] * 1e3:.1f}" if "measured" in row else "FAILED",
            f"{row['error']:+.0%}" if "error" in row else "",
            "yes" if row["within"] else "MISS",
        )
        for row in results["rows"]
    ]
    header = ("model", "configuration", "ZeRO", "predicted, ms", "measured, ms", "error", "within 15 %")
    return tables.markdown(header, rows)


def chosen(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of the GPUs that the paper names: A100 for the tokenizer, H100 for the transformer."""
    names = [name for name in report["runs"] if name.endswith("H100" if "transformer" in name else "A100")]
    return {"columns": report["columns"], "runs": {name: report["runs"][name] for name in names}}
