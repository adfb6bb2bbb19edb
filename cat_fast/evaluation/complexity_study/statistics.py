"""Correlation and agreement of metrics with the best ratio, with bootstrap intervals over images."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

_RESAMPLES = 1000
_LEVEL = 95.0
_CHUNK = 1 << 22
"""Values of resamples in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % percentile interval over resampled images."""

    value: float
    low: float
    high: float


Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Maps two arrays (..., N) to one value per row, (...)."""


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's r over the last axis; 0 where one side is constant."""
    x = x - x.mean(axis=-1, keepdims=True)
    y = y - y.mean(axis=-1, keepdims=True)
    norm = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return np.divide((x * y).sum(axis=-1), norm, out=np.zeros_like(norm), where=norm > 1e-12)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation over the last axis, ties at their mean rank."""
    return pearson(rankdata(x, axis=-1), rankdata(y, axis=-1))


def agreement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the share of equal values over the last axis."""
    return (x == y).mean(axis=-1)


def estimate(statistic: Statistic, x: np.ndarray, y: np.ndarray, seed: int = 0) -> Estimate:
    """Return a statistic of two columns (N,) with its interval."""
    values = _resampled(statistic, x, y, seed)
    return Estimate(float(statistic(x, y)), *_interval(values))


def difference(
    statistic: Statistic, first: np.ndarray, second: np.ndarray, target: np.ndarray, seed: int = 0
) -> Estimate:
    """Return how much better `first` is than `second` against `target`, paired over resampled images."""
    values = _resampled(statistic, first, target, seed) - _resampled(statistic, second, target, seed)
    return Estimate(float(statistic(first, target) - statistic(second, target)), *_interval(values))


def _resampled(statistic: Statistic, x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    random, count = np.random.default_rng(seed), len(x)
    rows = max(_CHUNK // max(count, 1), 1)
    found = []
    for start in range(0, _RESAMPLES, rows):
        # Equal seeds give equal resamples, whichever statistic they are for.
        chosen = random.integers(0, count, (min(rows, _RESAMPLES - start), count))
        found.append(statistic(x[chosen], y[chosen]))
    return np.concatenate(found)


def _interval(values: np.ndarray) -> tuple[float, float]:
    tail = (100 - _LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
