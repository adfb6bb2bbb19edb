"""Write the published tables of docs/evaluation.md, with our rows from benchmarks/results/evaluation/.

python scripts/evaluation_tables.py
"""

import tables

from cat_fast.evaluation.published.formats import format_table
from cat_fast.evaluation.published.tables import published, read_run, with_runs

DOCUMENT = tables.ROOT / "docs/evaluation.md"
RUNS = tables.ROOT / "benchmarks/results/evaluation"
"""One folder per data set, named after it, with results of `cat-fast eval`."""


def main() -> None:
    """Replace the tables in place."""
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """Return the document with updated tables."""
    folders = sorted(path for path in RUNS.glob("*") if path.is_dir())
    runs = [run for folder in folders for run in read_run(f"{folder.name}={folder}")]
    parts = [
        f"### `{table.name}`\n\n{format_table(with_runs(table, runs), 'markdown')}"
        for table in published().values()
    ]
    return tables.fill(text, {"published": "\n".join(parts)})


if __name__ == "__main__":
    main()
