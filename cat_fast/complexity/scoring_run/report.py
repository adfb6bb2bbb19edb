"""Summary of a file of scores, and its rows as JSON; one batch of rows is in memory."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cat_fast.complexity.choose import summarize_mix
from cat_fast.complexity.ratio import RATIOS
from cat_fast.complexity.scoring_run.decision import PATCH_SIZE, RESOLUTION
from cat_fast.complexity.scoring_run.run import ScoringResult
from cat_fast.complexity.scoring_run.score_file import ScoreFile, ScoreSettings
from cat_fast.data.files import atomic_write

_LEFT_OUT = ("scorer", "prompt_hash")
"""Columns with the same value in all rows, which the report holds once."""


@dataclass
class ScoreSummary:
    """First rows of a file of scores, the first ones that failed, and the mix of ratios of all."""

    settings: ScoreSettings
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    ratios: Counter[int] = field(default_factory=Counter)

    def cost(self) -> dict[str, Any] | None:
        """Return `summarize_mix` of the rows with a score; None if there are none."""
        total = self.ratios.total()
        if not total:
            return None
        return summarize_mix({f: self.ratios[f] / total for f in RATIOS}, RESOLUTION, PATCH_SIZE)


def summarize_scores(path: Path, max_rows: int, max_failures: int) -> ScoreSummary:
    """Return the summary of a file of scores, with its first rows and failures."""
    file = ScoreFile(path)
    summary = ScoreSummary(file.settings)
    for batch in file.batches():
        summary.ratios.update(ratio for ratio in batch["ratio"].to_pylist() if ratio is not None)
        if len(summary.rows) < max_rows:
            summary.rows += batch.slice(0, max_rows - len(summary.rows)).to_pylist()
        failed = batch.filter(batch["error"].is_valid())
        summary.failures += failed.slice(0, max(max_failures - len(summary.failures), 0)).to_pylist()
    return summary


def write_report(path: Path, result: ScoringResult, summary: ScoreSummary) -> None:
    """Write scorer, thresholds, mix, cost, problems and all rows as one JSON object, atomically."""
    settings = summary.settings
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
    with atomic_write(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "images": [')
        for number, row in enumerate(_rows(result.path)):
            file.write(",\n    " if number else "\n    ")
            file.write(json.dumps(row))
        file.write("\n  ]\n}\n")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for batch in ScoreFile(path).batches():
        yield from batch.drop_columns(_LEFT_OUT).to_pylist()
