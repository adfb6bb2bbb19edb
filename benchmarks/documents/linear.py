"""Table of kernels/linear/README.md from the committed results of the benchmark."""

from collections.abc import Mapping
from typing import Any

from benchmarks.documents import tables

DOCUMENT = tables.ROOT / "kernels/linear/README.md"


def filled(text: str) -> str:
    """Return the document with the table made from the results."""
    return tables.fill(text, {"speed": speed(tables.results("linear"))})


def speed(results: Mapping[str, Any]) -> str:
    """Return one row per kind of step: speed of oneDNN relative to MKL, and the noise."""
    rows = [
        (f"`{name}`", _spread(case["mkl_over_onednn"]), _spread(case["mkl_over_mkl"]))
        for name, case in results["cases"].items()
    ]
    return tables.markdown(("step", "oneDNN against MKL", "MKL against itself"), rows)


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
