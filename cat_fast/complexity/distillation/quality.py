"""Agreement of a scorer with raters: ratio agreement, rank correlation, error, mixes and reliability.

The reference is the mean m of the raters of a caption, not rounded: 32x for m <= a, 16x for m <= b, else 8x.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from cat_fast.complexity.ratios.mix import RATIOS
from cat_fast.complexity.ratios.thresholds import PUBLISHED, RatioThresholds

RESAMPLES = 1000
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A figure with the 95 % interval of its bootstrap over captions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """Agreement of predictions with the raters' means."""

    captions: int
    agreement: Estimate
    """Share of captions with the reference ratio, decided by the integer score."""
    spearman: Estimate
    """Rank correlation of the expected score with the mean rating."""
    mae: Estimate
    """Mean absolute error of the expected score."""
    mix: dict[int, float]
    """Share of each ratio by the predictions."""
    reference_mix: dict[int, float]
    """Share of each ratio by the raters' means."""


def ratios_of(values: np.ndarray, thresholds: RatioThresholds = PUBLISHED) -> np.ndarray:
    """Return the ratio of each score or mean rating, int64 (N,); real values are not rounded."""
    return np.where(values <= thresholds.a, 32, np.where(values <= thresholds.b, 16, 8))


def measure_quality(
    expected: np.ndarray, means: np.ndarray, *, thresholds: RatioThresholds = PUBLISHED, seed: int = 0
) -> Quality:
    """Compare expected scores with mean ratings, both float64 (N,)."""
    rounded = np.clip(np.floor(expected + 0.5), 1, 9)
    ratios, reference = ratios_of(rounded, thresholds), ratios_of(means, thresholds)
    agrees, error = ratios == reference, np.abs(expected - means)

    def figures(i: np.ndarray) -> tuple[float, float, float]:
        return float(agrees[i].mean()), spearman(expected[i], means[i]), float(error[i].mean())

    rng = np.random.default_rng(seed)
    n = len(means)
    samples = np.array([figures(rng.integers(0, n, n)) for _ in range(RESAMPLES)])
    low, high = np.nanquantile(samples, INTERVAL, axis=0)
    agreement, correlation, mean_error = (
        Estimate(*map(float, row)) for row in zip(figures(np.arange(n)), low, high, strict=True)
    )
    return Quality(n, agreement, correlation, mean_error, mix_of(ratios), mix_of(reference))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return the rank correlation of two arrays (N,); ties share their mean rank."""
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def mix_of(ratios: np.ndarray) -> dict[int, float]:
    """Return the share of each ratio, {8: share, 16: share, 32: share}."""
    return {ratio: float((ratios == ratio).mean()) for ratio in RATIOS}


@dataclass(frozen=True)
class ReliabilityBin:
    """Captions of similar confidence."""

    captions: int
    confidence: float
    """Mean confidence."""
    accuracy: float
    """Share whose mean rating is within 0.5 of the score."""


def reliability(
    confidence: np.ndarray, score: np.ndarray, means: np.ndarray, bins: int = 10
) -> tuple[list[ReliabilityBin], float]:
    """Return bins of equal size by confidence, and the expected calibration error over them."""
    right = np.abs(score - means) <= 0.5
    parts = [part for part in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(part)]
    result = [
        ReliabilityBin(len(part), float(confidence[part].mean()), float(right[part].mean())) for part in parts
    ]
    error = sum(b.captions * abs(b.confidence - b.accuracy) for b in result) / len(means)
    return result, float(error)


def largest_mix_difference(qualities: Sequence[Quality]) -> float:
    """Return the largest difference of a ratio's share from the raters', over all given groups."""
    return max(abs(q.mix[f] - q.reference_mix[f]) for q in qualities for f in RATIOS)
