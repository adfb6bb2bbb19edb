"""Bootstrap confidence intervals of means over images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_RESAMPLES = 10_000


def mean_with_interval(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Return mean, 95 % percentile interval over resampled images, and number of images."""
    array = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(len(array), size=(_RESAMPLES, len(array)))
    low, high = np.percentile(array[chosen].mean(1), [2.5, 97.5])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high), "images": len(array)}


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Return the mean of first - second per image with its 95 % interval, and whether it excludes zero."""
    found = mean_with_interval(np.subtract(first, second).tolist(), seed)
    return found | {"apart_from_zero": not found["low"] <= 0 <= found["high"]}
