"""Mean tokens and average rates of mixes of ratios."""

from collections.abc import Mapping
from itertools import product
from math import sqrt

SIDE = 512
PATCH = 2
ROUNDING = 0.005
"""Published shares are rounded to a percent."""


def mean_tokens(shares: Mapping[int, float]) -> float:
    """Return the mean tokens of a 512 px image; shares by ratio, relative to their sum."""
    total = sum(shares.values())
    return sum(share * (SIDE / ratio / PATCH) ** 2 for ratio, share in shares.items()) / total


def average_rate(shares: Mapping[int, float]) -> float:
    """Return the published "average rate": the image's side over the root mean square latent side."""
    return SIDE / (PATCH * sqrt(mean_tokens(shares)))


def rate_range(shares: Mapping[int, float]) -> tuple[float, float]:
    """Return the lowest and highest average rate of mixes that round to these shares."""
    rates = []
    for changes in product((-ROUNDING, ROUNDING), repeat=len(shares)):
        mix = {
            ratio: max(0.0, share + change)
            for (ratio, share), change in zip(shares.items(), changes, strict=True)
        }
        rates.append(average_rate(mix))
    return min(rates), max(rates)


def parse_mix(text: str) -> dict[int, float]:
    """Return the shares of a mix such as "6/49/45", percent at 8x, 16x and 32x."""
    return {ratio: int(part) / 100 for ratio, part in zip((8, 16, 32), text.split("/"), strict=True)}
