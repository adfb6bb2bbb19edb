"""Escalation of unsure scores."""

from collections.abc import Sequence

import pytest

from cat_fast.complexity import Description, Score, ScoringFailure
from cat_fast.complexity.scorers.escalating import EscalatingScorer
from cat_fast.errors import UserError


class Fixed:
    """Scorer with a given result per caption, which records what it is asked."""

    def __init__(self, name: str, results: dict[str, Score | ScoringFailure]) -> None:
        self.name, self.version, self.results = name, f"{name} 1", results
        self.asked: list[str] = []

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        self.asked += [description.caption for description in descriptions]
        return [self.results[description.caption] for description in descriptions]


def test_only_unsure_captions_go_to_the_second_scorer() -> None:
    first = Fixed(
        "fast",
        {
            "sure": Score(3, 3.1, 0.9),
            "limit": Score(4, 4.2, 0.6),
            "unsure": Score(5, 4.6, 0.3),
            "worse": Score(5, 4.6, 0.2),
            "failed": ScoringFailure("too odd"),
        },
    )
    second = Fixed(
        "llm",
        {
            "unsure": Score(7, 6.8, 0.8, "many people"),
            "worse": ScoringFailure("no valid score"),
            "failed": Score(2, 2.0),
        },
    )
    scorer = EscalatingScorer(first, second, 0.6)
    captions = ["unsure", "sure", "worse", "limit", "failed"]
    results = scorer.score_many([Description(caption) for caption in captions])
    assert second.asked == ["unsure", "worse", "failed"]
    assert results == [
        second.results["unsure"],
        first.results["sure"],
        ScoringFailure("escalated to llm: no valid score"),
        first.results["limit"],
        second.results["failed"],
    ]
    second.asked.clear()
    scorer.score_many([Description("sure")])
    assert second.asked == []
    assert scorer.name == "fast+llm"
    assert scorer.version != EscalatingScorer(first, second, 0.7).version


def test_a_first_scorer_without_confidence_and_limits_out_of_range_are_refused() -> None:
    first = Fixed("plain", {"a": Score(3, 3.0)})
    with pytest.raises(UserError, match="plain does not estimate a confidence"):
        EscalatingScorer(first, first, 0.5).score_many([Description("a")])
    for below in (0, 1.5, float("nan")):
        with pytest.raises(UserError, match="at most 1"):
            EscalatingScorer(first, first, below)
