"""A scorer whose scores follow from the caption's length, and helpers around it."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet

from cat_fast.complexity import Description, RatioThresholds, Score, ScoringFailure
from cat_fast.complexity.scoring_run.inputs import open_inputs
from cat_fast.complexity.scoring_run.outputs import Shard
from cat_fast.complexity.scoring_run.rows import CallSizes, ScoringResult
from cat_fast.complexity.scoring_run.run import score_set

SIZES = CallSizes(part=8, call=3)


class StubScorer:
    """Scores captions by their length; those that contain a word of `failing` fail."""

    name, version = "stub", "1"

    def __init__(self, failing: Iterable[str] = (), seconds: float = 0.0) -> None:
        self.failing, self.seconds = list(failing), seconds
        self.calls: list[list[str]] = []

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        self.calls.append([description.caption for description in descriptions])
        time.sleep(self.seconds)
        return [self._score(description.caption) for description in descriptions]

    def _score(self, caption: str) -> Score | ScoringFailure:
        if any(word in caption for word in self.failing):
            return ScoringFailure("the model answered nonsense")
        return Score.of_expected(1 + len(caption) * 0.37 % 8, 0.5, "by length")


def score(
    out: Path, *files: Path | str, scorer: StubScorer | None = None, shard: Shard | None = None, **options
) -> ScoringResult:
    inputs = open_inputs([str(file) for file in files])
    thresholds = options.pop("thresholds", RatioThresholds(4, 7))
    return score_set(
        inputs,
        scorer or StubScorer(),
        out,
        thresholds,
        shard=shard or Shard(),
        **({"sizes": SIZES} | options),
    )


def rows(path: Path) -> list[dict]:
    """Return the rows of a file without the column that measures time."""
    return pyarrow.parquet.read_table(path).drop_columns("seconds").to_pylist()
