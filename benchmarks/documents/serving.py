"""Tables of docs/inference.md from the committed results of `benchmarks.serving`."""

from collections.abc import Mapping
from typing import Any

from benchmarks.documents import tables

DOCUMENT = tables.ROOT / "docs/inference.md"
CONTESTANTS = {
    "engine": "engine, cost-aware",
    "engine_again": "the same again (A/A)",
    "engine_fifo_packed": "engine, FIFO",
    "dynamic_batching": "(a) dynamic batching",
    "fifo_step_batching": "(b) FIFO step batching",
    "deficit_round_robin": "(c) deficit round robin",
}
MIXES = {"cat": "6/49/45", "dataset_c": "Dataset C"}


def filled(text: str) -> str:
    """Return the document with updated tables."""
    measured, predicted = tables.results("serving"), tables.results("serving_simulation")
    made = {
        "serving": runs(measured["mixes"]),
        "serving goals": goals(measured["mixes"]),
        "serving rates": rates(measured["curve"]),
        "serving predicted": goals(predicted["mixes"]),
    }
    return tables.fill(text, made)


def runs(mixes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row per mix, load and contestant: the median of the rounds."""
    rows = [
        (
            MIXES[mix],
            f"{load} ×",
            shown,
            f"{found['images_per_second']:.2f}",
            *(f"{found[name]:.2f}" for name in ("p50", "p95", "p99")),
            f"{found['within_three_times_alone']:.0%}",
            f"{found['longest_wait']:.0f}",
            f"{found['fill']:.0%}",
            result["settings"][name].replace("rows=", "").replace(",wait=", " rows, "),
        )
        for mix, loads in mixes.items()
        for load, result in loads.items()
        for name, shown in CONTESTANTS.items()
        for found in [result["median"][name]]
    ]
    header = (
        "mix",
        "load",
        "schedule",
        "images/s",
        "p50, s",
        "p95, s",
        "p99, s",
        "within 3 ×",
        "wait",
        "fill",
    )
    return tables.markdown((*header, "budget"), rows)


def goals(mixes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row per goal; a ratio to a baseline of 0 has no limit."""
    rows = [
        (
            MIXES[mix],
            f"{load} ×",
            name.replace("_", " "),
            "no limit" if goal["value"] is None else f"{goal['value']:.3g}",
            f"{goal['goal']:.3g}",
            "yes" if goal["met"] else "no",
        )
        for mix, loads in mixes.items()
        for load, result in loads.items()
        for name, goal in result["goals"].items()
    ]
    return tables.markdown(("mix", "load", "figure", "value", "goal", "reached"), rows)


def rates(curve: Mapping[str, Any]) -> str:
    """Return the rate of the transformer by rows per step, and where more rows stop paying."""
    points = curve["points"]
    best = max(point["flops_per_second"] for point in points)
    header = ("rows per step", *(f"{point['rows']:,}" for point in points))
    rate = ("rows/s", *(f"{point['rows_per_second']:,.0f}" for point in points))
    share = ("of the best FLOP rate", *(f"{point['flops_per_second'] / best:.0%}" for point in points))
    enough = f"{curve['co_batching_stops_paying_at_rows']:,}"
    end = f"Co-batching stops paying at {enough} rows: larger steps are at most 5 % faster per FLOP."
    return f"{tables.markdown(header, (rate, share))}\n{end}\n"
