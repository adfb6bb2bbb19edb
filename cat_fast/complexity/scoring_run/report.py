"""Summary of scores, and their rows as JSON."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cat_fast.complexity.ratios.choose import summarize_mix
from cat_fast.complexity.ratios.mix import RATIOS
from cat_fast.complexity.scoring_run.decision import PATCH_SIZE, RESOLUTION
from cat_fast.complexity.scoring_run.rows import Row, ScoringResult
from cat_fast.data.files import atomic_write

_COLUMNS = (
    "key", "caption", "has_text", "has_faces", "score", "expected", "confidence", "ratio", "tokens",
    "reasons", "seconds", "error",
)  # fmt: skip
"""Columns of a row in the report, which holds scorer and prompt once."""


@dataclass
class ScoreSummary:
    """Mix of the ratios of all rows, the first rows, and the first ones that failed."""

    rows: list[Row] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)
    ratios: Counter[int] = field(default_factory=Counter)

    def cost(self) -> dict[str, Any] | None:
        """Return `summarize_mix` of the rows with a score; None if there are none."""
        total = self.ratios.total()
        if not total:
            return None
        return summarize_mix({f: self.ratios[f] / total for f in RATIOS}, RESOLUTION, PATCH_SIZE)


def summarize_rows(rows: Iterable[Row], max_rows: int, max_failures: int) -> ScoreSummary:
    """Return the summary of rows in memory."""
    summary = ScoreSummary()
    for row in rows:
        if row["ratio"] is not None:
            summary.ratios[row["ratio"]] += 1
        elif len(summary.failures) < max_failures:
            summary.failures.append(row)
        if len(summary.rows) < max_rows:
            summary.rows.append(row)
    return summary


def summarize_file(path: Path, max_rows: int, max_failures: int) -> ScoreSummary:
    """Return the summary of a file of scores, of which a batch is in memory."""
    from cat_fast.complexity.scoring_run.score_file import ScoreFile

    summary = ScoreSummary()
    for batch in ScoreFile(path).batches():
        summary.ratios.update(ratio for ratio in batch["ratio"].to_pylist() if ratio is not None)
        summary.rows += batch.slice(0, max_rows - len(summary.rows)).to_pylist()
        failed = batch.filter(batch["error"].is_valid())
        summary.failures += failed.slice(0, max_failures - len(summary.failures)).to_pylist()
    return summary


def rows_of_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of scores."""
    from cat_fast.complexity.scoring_run.score_file import ScoreFile

    for batch in ScoreFile(path).batches():
        yield from batch.to_pylist()


def write_report(path: Path, result: ScoringResult, summary: ScoreSummary, rows: Iterable[Row]) -> None:
    """Write scorer, thresholds, mix, cost, problems and all rows as one JSON object, atomically."""
    settings = result.settings
    head = {
        "scorer": settings.scorer,
        "version": settings.version,
        "prompt_hash": settings.prompt_hash,
        "thresholds": list(settings.thresholds),
        "mean_tokens_budget": settings.mean_tokens,
        "samples": result.rows,
        "failed": result.failed,
        "problems": result.problems,
        **(summary.cost() or {"mix": None, "mean_tokens": None}),
    }
    with atomic_write(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "images": [')
        for number, row in enumerate(rows):
            file.write(",\n    " if number else "\n    ")
            file.write(json.dumps({name: row[name] for name in _COLUMNS}))
        file.write("\n  ]\n}\n")
