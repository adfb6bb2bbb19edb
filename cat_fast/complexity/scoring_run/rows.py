"""Rows of scores: samples in calls of a scorer, with their scores or the reasons why they have none."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cat_fast.complexity.score import Score, Scorer, ScoringFailure
from cat_fast.complexity.scorers.loading import LANGUAGE_MODELS
from cat_fast.complexity.scoring_run.keys import KeysSeen
from cat_fast.complexity.scoring_run.outputs import ScoreSettings
from cat_fast.complexity.scoring_run.samples import Sample
from cat_fast.data.text_files import valid_text

REPEATED = "its key repeats that of an earlier sample"

Row = dict[str, Any]
"""A row of `score_file`, without ratio and tokens."""
OnProgress = Callable[[int, int], None]
"""Called after each call of the scorer, with the numbers of samples scored now and kept from earlier."""


@dataclass(frozen=True)
class CallSizes:
    """Numbers of samples that are scored and written together."""

    part: int = 8192
    """Samples per part: a killed run loses the scores of at most one."""
    call: int = 1024
    """Samples per call of the scorer, after each of which progress is reported."""


def sizes_for(name: str, escalated: bool = False) -> CallSizes:
    """Return the sizes for a scorer of `load_scorer`: seconds to minutes of work per part."""
    if escalated or name in LANGUAGE_MODELS:
        return CallSizes(128, 128)
    return CallSizes(2048, 128) if name == "accurate" else CallSizes(8192, 1024)


@dataclass
class ScoringResult:
    """Counts of a run."""

    settings: ScoreSettings
    seconds: float = 0.0
    rows: int = 0
    scored: int = 0
    """Samples scored by this run; the others were scored before, or cannot be."""
    failed: int = 0
    """Samples without a score."""
    problems: list[str] = field(default_factory=list)
    """One line per unusable input and half-written file, with its name."""


class RowScorer:
    """Scorer of samples into rows.

    Args:
        settings: settings of the scorer, of which each row has the names.
        call: samples per call of the scorer.
    """

    def __init__(
        self,
        scorer: Scorer,
        settings: ScoreSettings,
        call: int = CallSizes.call,
        on_progress: OnProgress = lambda scored, kept: None,
    ) -> None:
        self.scorer, self.settings, self.call, self.on_progress = scorer, settings, call, on_progress
        self.scored = 0
        """Number of samples scored so far."""

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """Return the rows of samples, in order; those with an error are not scored."""
        scorable = [sample.description for sample in samples if sample.error is None and sample.description]
        outcomes: list[tuple[Score | ScoringFailure, float | None]] = []
        for start in range(0, len(scorable), self.call):
            call = scorable[start : start + self.call]
            before = time.perf_counter()
            results = self.scorer.score_many(call)
            seconds = (time.perf_counter() - before) / len(call)
            outcomes += [(result, seconds) for _, result in zip(call, results, strict=True)]
            self.on_progress(len(call), 0)
        self.on_progress(0, len(samples) - len(scorable))
        self.scored += sum(isinstance(result, Score) for result, _ in outcomes)
        outcome = iter(outcomes)
        return [
            self._row(sample, *((ScoringFailure(sample.error), None) if sample.error else next(outcome)))
            for sample in samples
        ]

    def _row(self, sample: Sample, result: Score | ScoringFailure, seconds: float | None) -> Row:
        key, caption, has_text, has_faces = sample.identity
        row: Row = {
            "key": key,
            "caption": caption,
            "has_text": has_text,
            "has_faces": has_faces,
            "score": None,
            "expected": None,
            "confidence": None,
            "scorer": f"{self.settings.scorer} {self.settings.version}",
            "prompt_hash": self.settings.prompt_hash,
            "reasons": None,
            "seconds": seconds,
            "error": None,
        }
        if isinstance(result, ScoringFailure):
            return row | {"error": valid_text(result.error) or "the scorer gave no reason"}
        return row | {
            "score": result.score,
            "expected": result.expected,
            "confidence": result.confidence,
            "reasons": valid_text(result.reasons) or None,
        }


def mark_repeated(samples: Iterable[Sample], seen: KeysSeen) -> Iterator[Sample]:
    """Yield samples, with an error if their key repeats one of `seen` or of these samples."""
    for sample in samples:
        repeated = seen.add(sample.key) and sample.error is None
        yield replace(sample, error=REPEATED) if repeated else sample
