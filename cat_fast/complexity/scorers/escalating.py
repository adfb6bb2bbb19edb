"""Escalation of unsure scores to a second scorer, such as from a distilled scorer to a language model."""

import hashlib
from collections.abc import Sequence

from cat_fast.complexity.description import Description
from cat_fast.complexity.score import Score, Scorer, ScoringFailure
from cat_fast.errors import UserError


class EscalatingScorer:
    """Scorer that sends descriptions to `second` if `first` is not confident enough of their score.

    Descriptions that `first` cannot score are sent, too. A failure of `second` is the description's result:
    the score that `first` was unsure of does not replace it, so that it is tried again when a run is
    repeated.
    """

    def __init__(self, first: Scorer, second: Scorer, below: float) -> None:
        """Combine two scorers.

        Args:
            below: scores with a confidence below this are sent to `second`, in (0, 1].

        Raises:
            UserError: `below` is out of range.
        """
        if not 0 < below <= 1:
            raise UserError(f"the confidence to escalate below must be above 0 and at most 1, got {below}")
        self.first, self.second, self.below = first, second, below
        self.name = f"{first.name}+{second.name}"
        versions = f"{first.version}\0{second.version}\0{below!r}"
        self.version = hashlib.sha256(versions.encode()).hexdigest()[:12]

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        """Score each description, in order.

        Raises:
            UserError: `first` gives a score without a confidence.
        """
        results = self.first.score_many(descriptions)
        unsure = [i for i, result in enumerate(results) if self._is_unsure(result)]
        if not unsure:  # `second` may be a server, which is not needed then
            return results
        second = self.second.score_many([descriptions[i] for i in unsure])
        for i, result in zip(unsure, second, strict=True):
            if isinstance(result, ScoringFailure):
                result = ScoringFailure(f"escalated to {self.second.name}: {result.error}")
            results[i] = result
        return results

    def _is_unsure(self, result: Score | ScoringFailure) -> bool:
        if isinstance(result, ScoringFailure):
            return True
        if result.confidence is None:
            raise UserError(
                f"{self.first.name} does not estimate a confidence, so its unsure scores cannot be escalated;"
                " choose another first scorer"
            )
        return result.confidence < self.below
