"""Tables of docs/gpu.md: operators after the backward pass, and host time of a call."""

from collections.abc import Mapping
from typing import Any

from benchmarks.documents import tables

DOCUMENT = tables.ROOT / "docs/gpu.md"
CALLS = {
    "forward": "forward, without gradients",
    "forward_of_training": "forward of training",
    "forward_backward": "forward and backward",
    "choice_of_backend": "choice of a backend",
}
"""Names of the cases of `benchmarks.dispatch`."""


def filled(text: str) -> str:
    """Return the document with the tables made from the results."""
    made = {
        "launches": launches(tables.results("launches")),
        "dispatch": dispatch(tables.results("dispatch")),
    }
    return tables.fill(text, made)


def launches(results: Mapping[str, Any]) -> str:
    """Return the numbers of operators per configuration."""
    kinds = ("per_tensor", "foreach", "ours")
    rows = [
        (f"`{name}`", f"{case['tensors']}", *(f"{case[kind]['all']:,}" for kind in kinds))
        for name, case in results["cases"].items()
    ]
    return tables.markdown(("", "tensors", "a call per tensor", "`foreach`", "ours"), rows)


def dispatch(results: Mapping[str, Any]) -> str:
    """Return the processor time of a call, the usual way and ours."""
    rows = []
    for name, case in results["cases"].items():
        taken = case["processor_microseconds"]
        micros = [f"{taken[side]['median']:.1f} µs" for side in ("usual", "ours")]
        rows.append((CALLS[name], *micros, f"{case['usual_over_ours']['median']:.2f}"))
    return tables.markdown(("", "usual", "ours", "ratio"), rows)
