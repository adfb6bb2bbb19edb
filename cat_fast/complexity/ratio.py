"""From scores to compression ratios, and what ratios cost in tokens.

Score thresholds a < b give simple images few tokens and busy ones many; `RatioThresholds.fit` chooses them
so that a whole set of images costs what a tokenizer with one fixed ratio would.
"""

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cat_fast.errors import UserError

RATIOS = (8, 16, 32)
"""Compression ratios f of the nested tokenizer: an image of side r has a latent of side r / f."""
SCORES = range(1, 10)
"""Complexity scores, from 1 (a plane in the sky) to 9 (a newspaper page)."""


@dataclass(frozen=True, order=True)
class RatioThresholds:
    """Scores in [1, a] get 32x, in (a, b] 16x, in (b, 9] 8x. The published choice is (4, 7).

    Raises:
        UserError: a and b are not whole numbers with 0 <= a <= b <= 9.
    """

    a: int
    b: int

    def __post_init__(self) -> None:
        whole = all(isinstance(t, int) and not isinstance(t, bool) for t in (self.a, self.b))
        if not whole or not 0 <= self.a <= self.b <= SCORES[-1]:
            raise UserError(
                f"thresholds must be whole numbers with 0 <= a <= b <= 9, got ({self.a}, {self.b})"
            )

    @classmethod
    def parse(cls, text: str) -> "RatioThresholds":
        """Read "a,b", as a command line gives it."""
        try:
            a, b = (int(part) for part in text.split(","))
        except ValueError:
            raise UserError(f"thresholds must be two whole numbers such as 4,7, got {text!r}") from None
        return cls(a, b)

    def ratio(self, score: int) -> int:
        """Compression ratio of one image with `score` in 1..9; UserError for any other score."""
        score = _valid_score(score)
        return 32 if score <= self.a else 16 if score <= self.b else 8

    def ratios(self, scores: Iterable[int]) -> list[int]:
        """Compression ratio of each score, in order."""
        return [self.ratio(score) for score in scores]

    def mix(self, scores: Iterable[int]) -> dict[int, float]:
        """Share of each ratio over a set of scores: {8: share, 16: share, 32: share}, summing to 1."""
        return ratio_mix(self.ratios(scores))

    @classmethod
    def fit(cls, scores: Iterable[int], fixed_ratio: int = 16, tolerance: float = 0.05) -> "RatioThresholds":
        """Thresholds under which `scores` cost what a tokenizer fixed at `fixed_ratio` would.

        Solves the budget equation Σ p(f) r²/f² ≈ r²/fixed_ratio² over whole a < b, at any resolution r. One
        ratio for all would meet its own budget and adapt nothing, so only pairs that put images at all
        three ratios count; of those the nearest to the budget is taken (of equally near ones the lowest).

        Args:
            scores: complexity scores of a representative set of images, each in 1..9.
            fixed_ratio: the ratio whose budget is to be met, one of 8, 16, 32.
            tolerance: largest relative distance from the budget.

        Raises:
            UserError: no such pair uses all three ratios, or the nearest is farther off than `tolerance`.
        """
        _valid_ratio(fixed_ratio)
        scores = list(scores)
        pairs = [cls(a, b) for a in SCORES for b in SCORES if a < b]
        mixes = {pair: pair.mix(scores) for pair in pairs}
        costs = {pair: _relative_cost(mix, fixed_ratio) for pair, mix in mixes.items() if all(mix.values())}
        if not costs:
            raise UserError(
                "thresholds need at least three different scores to use all three ratios,"
                f" got {sorted(set(scores))}"
            )
        nearest = min(costs, key=lambda pair: (abs(costs[pair] - 1), pair))
        if abs(costs[nearest] - 1) > tolerance:
            raise UserError(
                f"no thresholds keep mean tokens within {tolerance:.1%} of a fixed {fixed_ratio}x"
                f" tokenizer's: the nearest pair is ({nearest.a}, {nearest.b}) at {costs[nearest] - 1:+.1%};"
                " allow a wider tolerance, or score more images"
            )
        return nearest


def ratio_mix(ratios: Iterable[int]) -> dict[int, float]:
    """Share of each ratio in `ratios`: {8: share, 16: share, 32: share}; UserError when there are none."""
    counts = Counter(_valid_ratio(ratio) for ratio in ratios)
    if not counts:
        raise UserError("there are no images to take a mix of ratios over")
    return {ratio: counts[ratio] / counts.total() for ratio in RATIOS}


def tokens_per_image(ratio: int, resolution: int | tuple[int, int] = 512, patch_size: int = 2) -> int:
    """Tokens of one image: (height / ratio / patch_size) · (width / ratio / patch_size).

    A square image of 512 px has 1024, 256 or 64.

    Args:
        ratio: 8, 16 or 32.
        resolution: side of a square image in pixels, or height and width.
        patch_size: side of a patch in latent pixels.

    Raises:
        UserError: `ratio` is not one of 8, 16, 32, or a side is not a multiple of ratio · patch_size.
    """
    _valid_ratio(ratio)
    unit = ratio * patch_size
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    for side in (height, width):
        if side % unit or side < unit:
            raise UserError(
                f"an image of {side} px has no whole number of {patch_size} x {patch_size} patches"
                f" at {ratio}x: use a multiple of {unit} px"
            )
    return (height // unit) * (width // unit)


def mean_tokens(mix: Mapping[int, float], resolution: int = 512, patch_size: int = 2) -> float:
    """Mean tokens an image under `mix` ({ratio: share}); ratios of share 0 cost nothing and need not fit."""
    shares = _valid_mix(mix).items()
    return math.fsum(
        share * tokens_per_image(ratio, resolution, patch_size) for ratio, share in shares if share
    )


def average_latent_side(mix: Mapping[int, float], resolution: int = 512) -> float:
    """The published "average latent dim": root mean square of the latent's side, in latent pixels.

    The square is what costs: tokens and FLOPs follow the latent's area, hence no arithmetic mean of sides.
    """
    return math.sqrt(math.fsum(share * (resolution / ratio) ** 2 for ratio, share in _valid_mix(mix).items()))


def average_ratio(mix: Mapping[int, float]) -> float:
    """The published "average rate": the fixed ratio with the same mean latent area, resolution / RMS side."""
    return 1 / average_latent_side(mix, resolution=1)


def _relative_cost(mix: Mapping[int, float], fixed_ratio: int) -> float:
    """Mean latent area under `mix`, as a multiple of the area at `fixed_ratio`."""
    return math.fsum(share * (fixed_ratio / ratio) ** 2 for ratio, share in mix.items())


def _valid_score(score: int) -> int:
    try:
        index = operator.index(score)
    except TypeError:
        index = 0
    if index not in SCORES:
        raise UserError(f"a complexity score must be a whole number from 1 to 9, got {score!r}")
    return index


def _valid_ratio(ratio: int) -> int:
    if ratio not in RATIOS:
        raise UserError(f"a compression ratio must be one of 8, 16 and 32, got {ratio!r}")
    return ratio


def _valid_mix(mix: Mapping[int, float]) -> Mapping[int, float]:
    for ratio in mix:
        _valid_ratio(ratio)
    if any(share < 0 for share in mix.values()) or not math.isclose(math.fsum(mix.values()), 1, abs_tol=1e-6):
        raise UserError(f"the shares of a mix of ratios must be positive and sum to 1, got {dict(mix)}")
    return mix
