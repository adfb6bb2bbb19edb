"""Thresholds from complexity scores to compression ratios, and their fit to a token budget.

Thresholds a < b give simple images few tokens and complex ones many. `RatioThresholds.fit` chooses integer
ones so that a set of images costs as much as with a fixed-ratio tokenizer; `RatioThresholds.within_budget`
chooses real ones on the expected score, which meet any budget that can be reached to within one image.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cat_fast.complexity.ratios.cuts import cut_within_budget
from cat_fast.complexity.ratios.mix import (
    RATIOS,
    average_ratio,
    mean_tokens,
    mix_entropy,
    require_budget,
    token_costs,
    valid_ratios,
)
from cat_fast.complexity.ratios.score_counts import ScoreCounts, ScoreSource
from cat_fast.data.images.label_fields import SCORES
from cat_fast.errors import UserError
from cat_fast.integers import as_integer

_ROUNDING = 1e-9
_BELOW, _ABOVE = 0.5, 9.5
"""Thresholds that no expected score reaches, and that none exceeds."""


class Scored(Protocol):
    """An integer score 1..9 and its expected value, None if it is not known."""

    @property
    def score(self) -> Any: ...
    @property
    def expected(self) -> float | None: ...


@dataclass(frozen=True, order=True, init=False)
class RatioThresholds:
    """Thresholds from scores to ratios: [1, a] gets 32x, (a, b] 16x, (b, 9] 8x. The published pair is (4, 7).

    Integers apply to the integer score. If one of them is not an integer, all apply to the expected score.

    Args:
        values: a and b; for another set of ratios, one value less than ratios.
        ratios: the ratios in ascending order; the highest is for the lowest scores.

    Raises:
        UserError: the values are not ascending numbers from 0 to 9.5, or their number does not fit `ratios`.
    """

    values: tuple[float, ...]
    ratio_set: tuple[int, ...]

    def __init__(self, *values: float, ratios: Sequence[int] = RATIOS) -> None:
        ratios = valid_ratios(ratios)
        if len(values) != len(ratios) - 1:
            raise UserError(
                f"expected {len(ratios) - 1} thresholds for the ratios {', '.join(map(str, ratios))},"
                f" got {len(values)}: {', '.join(map(str, values))}"
            )
        numeric = all(as_integer(t) is not None or isinstance(t, float | np.floating) for t in values)
        bounds = (0, *values, _ABOVE)
        if not numeric or not all(low <= high for low, high in itertools.pairwise(bounds)):
            raise UserError(
                f"thresholds must be numbers with 0 <= a <= b <= {_ABOVE},"
                f" got ({', '.join(map(str, values))})"
            )
        integral = all(float(t).is_integer() for t in values)
        object.__setattr__(self, "values", tuple(int(t) if integral else float(t) for t in values))
        object.__setattr__(self, "ratio_set", ratios)

    @classmethod
    def parse(cls, text: str) -> "RatioThresholds":
        """Parse the command-line form "a,b"."""
        return cls(*parse_numbers(text, "thresholds", "4,7 or 4.25,7.1", float))

    def __str__(self) -> str:
        return ",".join(map(str, self.values))

    def __repr__(self) -> str:
        others = "" if self.ratio_set == RATIOS else f", ratios={self.ratio_set}"
        return f"RatioThresholds({', '.join(map(str, self.values))}{others})"

    @property
    def a(self) -> float:
        """Largest score at the highest ratio."""
        return self.values[0]

    @property
    def b(self) -> float:
        """Largest score above the lowest ratio."""
        return self.values[-1]

    @property
    def pair(self) -> tuple[float, float]:
        """The values (a, b), to be stored; raise UserError for other ratios than those of the tokenizer."""
        if self.ratio_set != RATIOS:
            raise UserError(
                f"expected thresholds for the tokenizer's ratios {', '.join(map(str, RATIOS))}, got {self!r}"
            )
        return self.a, self.b

    @property
    def use_expected(self) -> bool:
        """True if the thresholds apply to the expected score, False if to the integer score."""
        return isinstance(self.values[0], float)

    def ratio(self, score: float) -> int:
        """Return the ratio for a score: an integer 1..9, or an expected score in [1, 9] if `use_expected`.

        Raises:
            UserError: any other value.
        """
        value = _real_score(score) if self.use_expected else _integer_score(score)
        return self.ratio_set[-1 - sum(value > t for t in self.values)]

    def ratio_of(self, score: Scored) -> int:
        """Return the ratio for a scorer's result or a labelled image, by its integer or expected score.

        Raises:
            UserError: the thresholds apply to expected scores, and the score has none.
        """
        if not self.use_expected:
            return self.ratio(score.score)
        if score.expected is None:
            raise UserError(
                f"the score {score.score} has no expected score, which the thresholds {self} apply to; store"
                ' it as "expected" next to the score, or use integer thresholds'
            )
        return self.ratio(score.expected)

    def ratios(self, scores: Iterable[float]) -> list[int]:
        """Return the ratio for each score, in order."""
        return [self.ratio(score) for score in scores]

    def mix(self, scores: ScoreSource) -> dict[int, float]:
        """Return the share of each ratio over a set of scores, {8: share, 16: share, 32: share}."""
        counts = ScoreCounts.of(scores)
        return _mix(self, *counts.sorted())

    @classmethod
    def fit(
        cls,
        scores: ScoreSource,
        target_ratio: float = 16,
        resolution: int | tuple[int, int] = 512,
        tolerance: float = 0.05,
        *,
        ratios: Sequence[int] = RATIOS,
        patch_size: int = 2,
    ) -> "RatioThresholds":
        """Return the most diverse of the `candidates`.

        Raises:
            UserError: no thresholds are within `tolerance` of the target, or only those that give all images
                one ratio: any set of images meets the budget of a ratio in this way.
        """
        counts, target_ratio = ScoreCounts.of(scores), float(target_ratio)
        found = cls.candidates(
            counts, target_ratio, resolution, math.inf, ratios=ratios, patch_size=patch_size
        )
        near = [one for one in found if one.is_near(target_ratio, tolerance)]
        if near and not near[0].entropy:
            raise UserError(
                f"within {tolerance:.1%} of {target_ratio:g}x, thresholds give all images one ratio: their"
                f" scores are {', '.join(f'{score:g}' for score in counts.sorted()[0])}; score more images"
            )
        if near:
            return near[0].thresholds
        nearest = min(found, key=lambda one: abs(one.average_ratio / target_ratio - 1))
        low, high = (f(one.average_ratio for one in found) for f in (min, max))
        raise UserError(
            f"no thresholds keep the average ratio within {tolerance:.1%} of {target_ratio:g}x; the nearest"
            f" are ({nearest.thresholds}) at {nearest.average_ratio:.2f}x, {nearest.mean_tokens:.1f} tokens"
            f" per image, and these scores reach {low:.2f}x to {high:.2f}x; increase the tolerance, score"
            " more images, or use real-valued thresholds (RatioThresholds.within_budget)"
        )

    @classmethod
    def candidates(
        cls,
        scores: ScoreSource,
        target_ratio: float = 16,
        resolution: int | tuple[int, int] = 512,
        tolerance: float = 0.05,
        *,
        ratios: Sequence[int] = RATIOS,
        patch_size: int = 2,
    ) -> list["Candidate"]:
        """Return all thresholds under which `scores` cost about as much as a tokenizer with a fixed ratio.

        Solves the budget equation Σ p(f) r²/f² ≈ r²/target_ratio² over all integers 1 <= a < b <= 8, which
        give at least one score each ratio.

        Args:
            scores: integer scores of a representative set of images, or their counts.
            target_ratio: the fixed ratio, not necessarily one of `ratios`.
            resolution: side of the images in pixels, or height and width, for their token counts.
            tolerance: maximum relative distance of the average ratio from `target_ratio`.
            ratios: the ratios in ascending order.
            patch_size: side of a patch in latent pixels.

        Returns:
            The thresholds with their mixes and costs, the most diverse mix first; ties in ascending order.

        Raises:
            UserError: there are no scores, a score is not an integer 1..9, or an argument is not valid.
        """
        ratios, target_ratio = valid_ratios(ratios), float(target_ratio)
        if not ratios[0] <= target_ratio <= ratios[-1]:  # also for NaN
            raise UserError(
                f"target_ratio is {target_ratio:g}, expected {ratios[0]} to {ratios[-1]}: mixes of the ratios"
                f" {', '.join(map(str, ratios))} have no other average"
            )
        if not tolerance >= 0:
            raise UserError(f"tolerance is {tolerance:g}, expected a positive number such as 0.05")
        values, weights = ScoreCounts.of(scores).sorted()
        if (values % 1).any():
            raise UserError(
                f"integer thresholds are fitted to integer scores, got {values[values % 1 > 0][0]:g}; use"
                " RatioThresholds.within_budget for expected scores"
            )
        token_costs(ratios, resolution, patch_size)  # checks the size for ratios without images, too
        found = []
        for chosen in itertools.combinations(SCORES[:-1], len(ratios) - 1):
            thresholds = cls(*chosen, ratios=ratios)
            candidate = Candidate.measure(thresholds, (values, weights), resolution, patch_size)
            if candidate.is_near(target_ratio, tolerance):
                found.append(candidate)
        return sorted(found, key=lambda one: (-round(one.entropy, 12), one.thresholds))

    @classmethod
    def within_budget(
        cls,
        expected: ScoreSource,
        mean_tokens: float,
        *,
        resolution: int | tuple[int, int] = 512,
        patch_size: int = 2,
        ratios: Sequence[int] = RATIOS,
    ) -> "RatioThresholds":
        """Return real-valued thresholds whose mean tokens come nearest to `mean_tokens` without exceeding it.

        The budget is met to within one image, unless images have equal scores: these get one ratio, so that
        a budget between two divisions is met from below. Among thresholds within one image of the nearest,
        the most diverse mix is chosen. `ratios_within_budget` also divides images of equal scores.

        Args:
            expected: expected scores of a representative set of images, or their counts.
            mean_tokens: maximum mean tokens per image of this set.
            resolution: side of the images in pixels, or height and width.
            patch_size: side of a patch in latent pixels.
            ratios: the ratios in ascending order.

        Raises:
            UserError: the budget is below the cost of all images at the highest ratio, there are no scores,
                or a score is not from 1 to 9.
        """
        ratios = valid_ratios(ratios)
        costs = token_costs(ratios, resolution, patch_size)
        require_budget(mean_tokens, ratios, costs, resolution)
        values, weights = ScoreCounts.of(expected).sorted()
        descending = np.concatenate([[0.0], np.cumsum(weights[::-1])])
        total = descending[-1]
        in_images = not (weights % 1).any()  # else shares, of which one image is not known
        cuts = cut_within_budget(
            descending,
            costs,
            min(mean_tokens, costs[0]) * total,
            slack=min(a - b for a, b in itertools.pairwise(costs)) - 1 if in_images else 0.0,
        )
        return cls(*(_between(values, len(values) - cut) for cut in reversed(cuts)), ratios=ratios)


PUBLISHED = RatioThresholds(4, 7)
"""The published pair, and the default."""


def default_thresholds() -> RatioThresholds:
    """Return the thresholds that apply unless others are given: the published pair."""
    return PUBLISHED


@dataclass(frozen=True)
class Candidate:
    """Thresholds with the mix of ratios that they give a set of images, and its cost."""

    thresholds: RatioThresholds
    mix: dict[int, float]
    """Share of each ratio."""
    entropy: float
    """Diversity of the mix, in nats (`mix_entropy`)."""
    average_ratio: float
    """Fixed ratio of the same cost: the published "average rate"."""
    mean_tokens: float
    """Mean tokens per image."""

    @classmethod
    def measure(
        cls,
        thresholds: RatioThresholds,
        scores: ScoreSource | tuple[np.ndarray, np.ndarray],
        resolution: int | tuple[int, int] = 512,
        patch_size: int = 2,
    ) -> "Candidate":
        """Return the mix and cost of thresholds on scores, or on the arrays of `ScoreCounts.sorted`."""
        values, weights = scores if isinstance(scores, tuple) else ScoreCounts.of(scores).sorted()
        mix, ratios = _mix(thresholds, values, weights), thresholds.ratio_set
        return cls(
            thresholds,
            mix,
            mix_entropy(mix),
            average_ratio(mix, ratios=ratios),
            mean_tokens(mix, resolution, patch_size, ratios=ratios),
        )

    def is_near(self, target_ratio: float, tolerance: float) -> bool:
        """Return True if the average ratio is within a relative tolerance of a target."""
        return abs(self.average_ratio / target_ratio - 1) <= tolerance + _ROUNDING


def parse_numbers(text: str, name: str, example: str, kind: type = int) -> list[Any]:
    """Parse two numbers in the command-line form "a,b".

    Raises:
        UserError: the text has another form; the message contains `name` and `example`.
    """
    try:
        a, b = map(kind, text.split(","))
    except ValueError:
        described = "integers" if kind is int else "numbers"
        raise UserError(f"{name} must be two {described} such as {example}, got {text!r}") from None
    return [a, b]


def _mix(thresholds: RatioThresholds, values: np.ndarray, weights: np.ndarray) -> dict[int, float]:
    """Return the shares of the ratios; `values` are the different scores, ascending, with their weights."""
    if not thresholds.use_expected:
        for value in values[values % 1 > 0][:1]:
            _integer_score(float(value))  # raises
    bounds = [0, *np.searchsorted(values, thresholds.values, side="right").tolist(), len(values)]
    parts = [math.fsum(weights[low:high]) for low, high in itertools.pairwise(bounds)]
    total = math.fsum(weights)
    return {ratio: part / total for ratio, part in zip(thresholds.ratio_set, reversed(parts), strict=True)}


def _between(values: np.ndarray, count: int) -> float:
    """Return a short decimal, not an integer, that `count` of the ascending values do not exceed."""
    if count == 0:
        return _BELOW
    if count == len(values):
        return _ABOVE
    low, high = float(values[count - 1]), float(values[count])
    for digits, part in itertools.product(range(1, 18), (0.5, 0.47)):
        found = round(low + part * (high - low), digits)
        if low <= found < high and not found.is_integer():
            return found
    return low


def _integer_score(score: Any) -> int:
    integer = as_integer(score)
    if integer is None or integer not in SCORES:
        raise UserError(f"a complexity score must be an integer from 1 to 9, got {score!r}")
    return integer


def _real_score(score: Any) -> float:
    is_number = isinstance(score, int | float | np.number) and not isinstance(score, bool)
    if not is_number or not SCORES[0] <= score <= SCORES[-1]:
        raise UserError(f"an expected score must be a number from 1 to 9, got {score!r}")
    return float(score)
