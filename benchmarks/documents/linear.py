"""Table of kernels/linear/README.md from the committed results of the benchmark."""

from collections.abc import Mapping
from typing import Any

from benchmarks.documents import tables

DOCUMENT = tables.ROOT / "kernels/linear/README.md"
LEAST_SHARE = 0.2
"""Share of products in a step up to which its speed does not show theirs."""


def filled(text: str) -> str:
    """Return the document with the table made from the results."""
    return tables.fill(text, {"speed": speed(tables.results("linear"))})


def speed(results: Mapping[str, Any]) -> str:
    """Return one row per kind of step: speed of oneDNN relative to MKL, the noise, and the limit."""
    alone = {name: _of_products(case) for name, case in results["cases"].items()}
    best = max(ratio for ratio in alone.values() if ratio)
    rows = [
        (
            f"`{name}`",
            _spread(case["mkl_over_onednn"]),
            _spread(case["mkl_over_mkl"]),
            f"{case['share_of_products']:.0%}",
            f"{alone[name]:.2f}" if alone[name] else "",
            f"{_of_step(best, case['share_of_products']):.2f}",
        )
        for name, case in results["cases"].items()
    ]
    header = (
        "step",
        "oneDNN against MKL",
        "MKL against itself",
        "share of products, MKL",
        "gain of the products",
        "step at their best gain",
    )
    return tables.markdown(header, rows)


def _of_products(case: Mapping[str, Any]) -> float | None:
    """Return how many times as fast a step's products are by oneDNN, or None if it has few."""
    ratio, share = case["mkl_over_onednn"]["median"], case["share_of_products"]
    return share / (1 / ratio - 1 + share) if share > LEAST_SHARE else None


def _of_step(ratio: float, share: float) -> float:
    """Return how many times as fast a step is whose products are `ratio` times as fast."""
    return 1 / (1 - share + share / ratio)


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
