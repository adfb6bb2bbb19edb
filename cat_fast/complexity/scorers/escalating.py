"""Escalation of unsure scores to a second scorer."""

from collections.abc import Sequence

from cat_fast.complexity.description import Description
from cat_fast.complexity.score import Score, Scorer, ScoringFailure


class EscalatingScorer:
    """Scorer that sends only descriptions that `first` is unsure about to `second`."""

    def __init__(self, first: Scorer, second: Scorer, below: float) -> None:
        raise NotImplementedError

    name: str
    version: str

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        raise NotImplementedError
