"""Write the published tables of docs/evaluation.md, with our rows from benchmarks/results.

    python scripts/evaluation_tables.py
"""

import tables

from cat_fast.evaluation.published.formats import format_table
from cat_fast.evaluation.published.tables import Run, Table, published, read_run, with_runs

DOCUMENT = tables.ROOT / "docs/evaluation.md"
RUNS = tables.ROOT / "benchmarks/results/evaluation"
"""One folder per data set, named after it, with results of `cat-fast eval`."""
STUDIES = {"712 photographs": "complexity_712", "1,000 photographs": "complexity_1000"}
"""Committed studies of `cat-fast eval complexity`, by data set."""
OTHER_MODELS = ("latent-channels", "thresholds", "ldm", "others")
"""Tables that compare models which the committed results are not of."""


def main() -> None:
    """Replace the tables in place."""
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """Return the document with updated tables."""
    runs = committed_runs()
    parts = [
        f"### `{table.name}`\n\n{format_table(with_ours(table, runs), 'markdown')}"
        for table in published().values()
    ]
    return tables.fill(text, {"published": "\n".join(parts)})


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


if __name__ == "__main__":
    main()
