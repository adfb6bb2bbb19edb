"""Results of scoring, and the interface that all scorers share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cat_fast.complexity.description import Description
from cat_fast.data.images.label_fields import SCORES
from cat_fast.errors import UserError
from cat_fast.integers import store_integers


@dataclass(frozen=True)
class Score:
    """Complexity score of a description.

    Raises:
        UserError: `score` is not in 1..9, or `expected` or `confidence` is out of range.
    """

    score: int
    """Integer score 1..9, which the published thresholds apply to."""
    expected: float
    """Expected value of the score before rounding, in [1, 9]."""
    confidence: float | None = None
    """Estimated probability that the mean of human-like raters is within 0.5 of `score`; None if the scorer
    does not estimate it."""
    reasons: str = ""
    """Reasons in words, if the scorer gives any."""

    def __post_init__(self) -> None:
        store_integers(self, "score")
        if self.score not in SCORES:
            raise UserError(f"a complexity score must be an integer from 1 to 9, got {self.score!r}")
        if not SCORES[0] <= self.expected <= SCORES[-1]:
            raise UserError(f"an expected score must be from 1 to 9, got {self.expected!r}")
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise UserError(f"a confidence must be from 0 to 1, got {self.confidence!r}")

    @classmethod
    def of_expected(cls, expected: float, confidence: float | None = None, reasons: str = "") -> "Score":
        """Return the score of an expected value; half a point rounds up."""
        return cls(round_score(expected), expected, confidence, reasons)


@dataclass(frozen=True)
class ScoringFailure:
    """A description that could not be scored; it has no score."""

    error: str
    """Reason in one line."""


class Scorer(Protocol):
    """Interface of everything that scores descriptions: distilled scorers, language models, endpoints."""

    @property
    def name(self) -> str:
        """Name of the scorer, stored with its scores."""
        ...

    @property
    def version(self) -> str:
        """Version of the scorer, which differs if its scores do; stored with them."""
        ...

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        """Score each description, in order.

        A description that cannot be scored gets a `ScoringFailure` and does not affect the others. Errors
        that concern all of them, such as a missing model, raise UserError.
        """
        ...


def require_scores(scorer: Scorer, descriptions: Sequence[Description]) -> list[Score]:
    """Score each description, in order; raise UserError naming the first that cannot be scored."""
    scores: list[Score] = []
    for description, result in zip(descriptions, scorer.score_many(descriptions), strict=True):
        if isinstance(result, ScoringFailure):
            raise UserError(f"{_shorten(description.caption)!r} could not be scored: {result.error}")
        scores.append(result)
    return scores


def round_score(expected: float) -> int:
    """Round an expected score to 1..9; half a point rounds up."""
    return min(max(math.floor(expected + 0.5), SCORES[0]), SCORES[-1])


def _shorten(caption: str, length: int = 60) -> str:
    return caption if len(caption) <= length else caption[: length - 1] + "…"
