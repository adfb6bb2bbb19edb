"""Thresholds from scores to compression ratios.

Thresholds a < b give simple images few tokens and complex ones many. `RatioThresholds.fit` chooses them so
that a set of images costs as much as with a fixed-ratio tokenizer.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from cat_fast.complexity.ratios.mix import ratio_mix, relative_cost, valid_ratio
from cat_fast.data.images.label_fields import SCORES
from cat_fast.errors import UserError
from cat_fast.integers import store_integers


@dataclass(frozen=True, order=True)
class RatioThresholds:
    """Thresholds from scores to ratios: [1, a] gets 32x, (a, b] 16x, (b, 9] 8x. The published pair is (4, 7).

    Raises:
        UserError: a and b are not integers with 0 <= a <= b <= 9.
    """

    a: int
    b: int

    def __post_init__(self) -> None:
        store_integers(self, "a", "b")
        are_integers = all(isinstance(t, int) and not isinstance(t, bool) for t in (self.a, self.b))
        if not are_integers or not 0 <= self.a <= self.b <= SCORES[-1]:
            raise UserError(f"thresholds must be integers with 0 <= a <= b <= 9, got ({self.a}, {self.b})")

    @classmethod
    def parse(cls, text: str) -> "RatioThresholds":
        """Parse the command-line form "a,b"."""
        return cls(*parse_pair(text, "thresholds", "4,7"))

    def ratio(self, score: int) -> int:
        """Return the compression ratio for a score in 1..9; raise UserError for any other score."""
        score = _valid_score(score)
        return 32 if score <= self.a else 16 if score <= self.b else 8

    def ratios(self, scores: Iterable[int]) -> list[int]:
        """Return the compression ratio for each score, in order."""
        return [self.ratio(score) for score in scores]

    def mix(self, scores: Iterable[int]) -> dict[int, float]:
        """Return the share of each ratio over a set of scores, {8: share, 16: share, 32: share}."""
        return ratio_mix(self.ratios(scores))

    @classmethod
    def fit(cls, scores: Iterable[int], fixed_ratio: int = 16, tolerance: float = 0.05) -> "RatioThresholds":
        """Find thresholds under which `scores` cost as much as a tokenizer with a fixed ratio.

        Solves the budget equation Σ p(f) r²/f² ≈ r²/fixed_ratio² over integers a < b, at any resolution r.
        Only pairs that use all three ratios count: one ratio for all images would meet its own budget without
        adapting to anything. The pair nearest to the budget is returned; ties go to the lowest.

        Args:
            scores: complexity scores of a representative set of images, each in 1..9.
            fixed_ratio: the ratio whose budget to meet, one of 8, 16, 32.
            tolerance: maximum relative distance from the budget.

        Raises:
            UserError: no pair uses all three ratios, or the nearest one exceeds `tolerance`.
        """
        fixed_ratio = valid_ratio(fixed_ratio)
        scores = list(scores)
        pairs = [cls(a, b) for a in SCORES for b in SCORES if a < b]
        mixes = {pair: pair.mix(scores) for pair in pairs}
        costs = {pair: relative_cost(mix, fixed_ratio) for pair, mix in mixes.items() if all(mix.values())}
        if not costs:
            raise UserError(
                "thresholds need at least three different scores to use all three ratios,"
                f" got {sorted(set(scores))}; score more images"
            )
        nearest = min(costs, key=lambda pair: (abs(costs[pair] - 1), pair))
        if abs(costs[nearest] - 1) > tolerance:
            raise UserError(
                f"no thresholds keep mean tokens within {tolerance:.1%} of a fixed {fixed_ratio}x tokenizer;"
                f" the nearest pair is ({nearest.a}, {nearest.b}) at {costs[nearest] - 1:+.1%};"
                " increase the tolerance or score more images"
            )
        return nearest


def parse_pair(text: str, name: str, example: str) -> tuple[int, int]:
    """Parse two integers in the command-line form "a,b".

    Raises:
        UserError: the text has another form; the message contains `name` and `example`.
    """
    try:
        a, b = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{name} must be two integers such as {example}, got {text!r}") from None
    return a, b


def _valid_score(score: int) -> int:
    try:
        index = operator.index(score)
    except TypeError:
        index = 0
    if index not in SCORES:
        raise UserError(f"a complexity score must be an integer from 1 to 9, got {score!r}")
    return index
