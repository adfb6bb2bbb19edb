"""95 % intervals: the percentile bootstrap over images, and the jackknife over groups of images.

Means and ratios of sums are bootstrapped. The Fréchet distance is not: a resample repeats images, which
lowers the rank of its covariance and raises the distance, so that the interval would be above the value.
Leaving out one of ten groups at a time repeats no image.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
GROUPS = 10
_CHUNK = 2_000_000
"""Maximum number of indices drawn at a time."""
_NORMAL_975 = 1.959963984540054


class Estimate(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate | None:
    """Return the mean and its bootstrap interval; None without values.

    Raises:
        ValueError: a value is not finite.
    """
    return ratio_interval(values, np.ones(len(values)), seed, resamples)


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float] | np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate | None:
    """Return sum / sum and its bootstrap interval over images; None if the denominators sum to 0."""
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if not (np.isfinite(above).all() and np.isfinite(below).all()):
        raise ValueError("expected finite values")
    if not below.sum():
        return None
    random = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    per_chunk = max(1, _CHUNK // len(above))
    for first in range(0, resamples, per_chunk):
        drawn = random.integers(0, len(above), (min(per_chunk, resamples - first), len(above)))
        sums = below[drawn].sum(1)
        found.append(above[drawn].sum(1)[sums > 0] / sums[sums > 0])
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return Estimate(float(above.sum() / below.sum()), float(low), float(high))


def group_jackknife(value: float, without_group: Sequence[float]) -> Estimate:
    """Return a value and the interval from its values without one group of images at a time."""
    left_out, count = np.asarray(without_group, np.float64), len(without_group)
    error = float(((count - 1) / count * np.square(left_out - left_out.mean()).sum()) ** 0.5)
    return Estimate(value, value - _NORMAL_975 * error, value + _NORMAL_975 * error)


def jackknife_over_images(
    count: int, compute: Callable[[np.ndarray], float], groups: int = GROUPS
) -> Estimate | None:
    """Return `compute` of all images and its interval; None if there are too few images for the groups.

    Args:
        count: number of images; image i is in group i mod `groups`.
        compute: returns the value of the images with these numbers.
    """
    if count < 2 * groups:
        return None
    numbers = np.arange(count)
    return group_jackknife(
        compute(numbers), [compute(numbers[numbers % groups != group]) for group in range(groups)]
    )
