"""Score thresholds, compression ratios and their token counts.

Thresholds a < b give simple images few tokens and complex ones many. `RatioThresholds.fit` chooses them so
that a set of images costs as much as with a fixed-ratio tokenizer.
"""

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cat_fast.errors import UserError

RATIOS = (8, 16, 32)
"""Compression ratios f of the nested tokenizer: an image of side r has a latent of side r/f."""
SCORES = range(1, 10)
"""Complexity scores, from 1 (a plane in the sky) to 9 (a newspaper page)."""


@dataclass(frozen=True, order=True)
class RatioThresholds:
    """Thresholds from scores to ratios: [1, a] gets 32x, (a, b] 16x, (b, 9] 8x. The published pair is (4, 7).

    Raises:
        UserError: a and b are not integers with 0 <= a <= b <= 9.
    """

    a: int
    b: int

    def __post_init__(self) -> None:
        are_integers = all(isinstance(t, int) and not isinstance(t, bool) for t in (self.a, self.b))
        if not are_integers or not 0 <= self.a <= self.b <= SCORES[-1]:
            raise UserError(f"thresholds must be integers with 0 <= a <= b <= 9, got ({self.a}, {self.b})")

    @classmethod
    def parse(cls, text: str) -> "RatioThresholds":
        """Parse the command-line form "a,b"."""
        try:
            a, b = (int(part) for part in text.split(","))
        except ValueError:
            raise UserError(f"thresholds must be two integers such as 4,7, got {text!r}") from None
        return cls(a, b)

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
        _valid_ratio(fixed_ratio)
        scores = list(scores)
        pairs = [cls(a, b) for a in SCORES for b in SCORES if a < b]
        mixes = {pair: pair.mix(scores) for pair in pairs}
        costs = {pair: _relative_cost(mix, fixed_ratio) for pair, mix in mixes.items() if all(mix.values())}
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


def ratio_mix(ratios: Iterable[int]) -> dict[int, float]:
    """Return the share of each ratio, {8: share, 16: share, 32: share}, summing to 1.

    Raises:
        UserError: `ratios` is empty or contains an unknown ratio.
    """
    counts = Counter(_valid_ratio(ratio) for ratio in ratios)
    if not counts:
        raise UserError("a mix of ratios needs at least one image, got no images")
    return {ratio: counts[ratio] / counts.total() for ratio in RATIOS}


def tokens_per_image(ratio: int, resolution: int | tuple[int, int] = 512, patch_size: int = 2) -> int:
    """Return the tokens of one image, (height / ratio / patch_size) · (width / ratio / patch_size).

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
                f"an image of {side} px does not divide into {patch_size} x {patch_size} patches"
                f" at {ratio}x; use a multiple of {unit} px"
            )
    return (height // unit) * (width // unit)


def mean_tokens(mix: Mapping[int, float], resolution: int = 512, patch_size: int = 2) -> float:
    """Return the mean tokens per image of `mix`, {ratio: share}; ratios of share 0 are ignored."""
    shares = _valid_mix(mix).items()
    return math.fsum(
        share * tokens_per_image(ratio, resolution, patch_size) for ratio, share in shares if share
    )


def average_latent_side(mix: Mapping[int, float], resolution: int = 512) -> float:
    """Return the published "average latent dim": the root mean square of the latent side, in latent pixels.

    Tokens and FLOPs are proportional to the latent's area, hence not the arithmetic mean of sides.
    """
    return math.sqrt(math.fsum(share * (resolution / ratio) ** 2 for ratio, share in _valid_mix(mix).items()))


def average_ratio(mix: Mapping[int, float]) -> float:
    """Return the published "average rate": the fixed ratio with the same mean latent area."""
    return 1 / average_latent_side(mix, resolution=1)


def _relative_cost(mix: Mapping[int, float], fixed_ratio: int) -> float:
    """Return the mean latent area of `mix`, relative to the area at `fixed_ratio`."""
    return math.fsum(share * (fixed_ratio / ratio) ** 2 for ratio, share in mix.items())


def _valid_score(score: int) -> int:
    try:
        index = operator.index(score)
    except TypeError:
        index = 0
    if index not in SCORES:
        raise UserError(f"a complexity score must be an integer from 1 to 9, got {score!r}")
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
