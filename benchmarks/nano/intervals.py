"""Means over images with their bootstrap intervals, as JSON."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cat_fast.evaluation.intervals import mean_interval

_RESAMPLES = 10_000


def mean_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, 95 % interval over images, and number of images, of at least one."""
    found = mean_interval(values, resamples=_RESAMPLES)
    assert found is not None
    return {"mean": found.value, "low": found.low, "high": found.high, "images": len(values)}


def paired_difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Return the mean of first - second per image with its 95 % interval, and whether it excludes zero."""
    found = mean_with_interval(np.subtract(first, second).tolist())
    return found | {"apart_from_zero": not found["low"] <= 0 <= found["high"]}
