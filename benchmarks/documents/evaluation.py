"""Write the published tables of docs/evaluation.md, with our rows from benchmarks/results."""

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.documents import tables
from cat_fast.evaluation.published.formats import format_table
from cat_fast.evaluation.published.tables import Run, Table, published, read_run, with_runs

DOCUMENT = tables.ROOT / "docs/evaluation.md"
RUNS = tables.ROOT / "benchmarks/results/evaluation"
"""One folder per data set, named after it, with results of `cat-fast eval`."""
PROBES = RUNS / "CIFAR-10/classification.json"
CASES = {
    "statistics": "mean and covariance of 50,000 images, 2,048 features",
    "square_root": "Fréchet distance of 2,048 features",
    "neighbours": "precision and recall, 50,000 samples and 10,000 references",
    "metrics": "PSNR, SSIM, LPIPS and Inception features, 256 px",
    "training": "evaluations during training, share of the time (nano tokenizer)",
}
STUDIES = {"712 photographs": "complexity_712", "1,000 photographs": "complexity_1000"}
"""Committed studies of `cat-fast eval complexity`, by data set."""
OTHER_MODELS = ("latent-channels", "thresholds", "ldm", "others")
"""Tables that compare models which the committed results are not of."""


def filled(text: str) -> str:
    """Return the document with updated tables."""
    runs = committed_runs()
    parts = [
        f"### `{table.name}`\n\n{format_table(with_ours(table, runs), 'markdown')}"
        for table in published().values()
    ]
    return tables.fill(
        text,
        {
            "published": "\n".join(parts),
            "probes": probes(json.loads(PROBES.read_text(encoding="utf-8"))),
            "bounds": bounds(tables.results("evaluation")),
        },
    )


def probes(result: Mapping[str, Any]) -> str:
    """Return the accuracies of a classification, and whether training the encoder helped."""
    rows = [
        (row["name"], row["head"], f"{row['head_inputs']:,}", _accuracy(row["accuracy"]))
        for row in result["rows"]
    ]
    flattened = {row["name"]: row["accuracy"] for row in result["rows"] if row["head"] == "flattened"}
    lines = []
    for name, untrained in flattened.items():
        if not name.startswith("untrained "):
            continue
        ratio = name.removeprefix("untrained ")
        trained = flattened[f"ours {ratio}"]
        verdict = "above" if trained["interval"][0] > untrained["interval"][1] else "not above"
        lines.append(
            f"- At {ratio}, the accuracy of the trained encoder is {verdict} that of the untrained one"
            " outside the intervals."
        )
    timing = result["timing"]
    lines.append(
        f"- {timing['cpu_seconds'] / 60:.1f} CPU-minutes on {timing['processor']}, all heads included."
    )
    return (
        tables.markdown(("row", "head", "inputs", "accuracy (95 %)"), rows) + "\n" + "\n".join(lines) + "\n"
    )


def _accuracy(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{100 * figure['value']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def bounds(report: Mapping[str, Any]) -> str:
    """Return measured time and memory next to their bounds."""
    rows = []
    for name, row in report["cases"].items():
        rows.append(
            (
                CASES[name],
                " and ".join(_limit(key, limit) for key, limit in report["bounds"][name].items()),
                " and ".join(_limit(key, row[key]) for key in report["bounds"][name]),
                f"{row['seconds']:.0f} s",
                " to ".join(f"{load:.0f}" for load in row["load"]),
            )
        )
    return tables.markdown(("evaluation", "at most", "measured", "elapsed", "load"), rows)


def _limit(key: str, value: float) -> str:
    if key == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if key == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.3g} CPU s" + (" per image" if key.endswith("per_image") else "")


def committed_runs() -> list[Run]:
    """Return our committed results."""
    folders = sorted(path for path in RUNS.glob("*") if path.is_dir())
    runs = [run for folder in folders for run in read_run(f"{folder.name.replace('_', ' ')}={folder}")]
    studies = [
        Run(dataset=dataset, path=tables.ROOT, result={"evaluation": "complexity", **tables.results(name)})
        for dataset, name in STUDIES.items()
    ]
    return runs + studies


def with_ours(table: Table, runs: list[Run]) -> Table:
    """Return a table with our rows, if it compares what our results are of."""
    return table if table.name in OTHER_MODELS else with_runs(table, runs)
