"""Accuracy of probes with 95 % intervals, and the JSON result."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cat_fast.evaluation.classification.arrays import read_arrays
from cat_fast.evaluation.provenance import versions

_NORMAL_975 = 1.959963984540054


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927)."""
    share, z2 = right / count, _NORMAL_975**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL_975 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return centre - half, centre + half


def row(
    name: str, head: str, predictions: Path, test: Path, features: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one row of the result.

    Args:
        predictions: file with the predicted class of each test image.
        test: folder of the test arrays.
        features: inputs of the head.
    """
    arrays = read_arrays(test)
    guesses = np.load(predictions, allow_pickle=False)
    right = int((guesses == arrays.labels).sum())
    low, high = wilson_interval(right, len(arrays))
    ratios, counts = np.unique(arrays.ratios, return_counts=True)
    return {
        "name": name,
        "head": head,
        "accuracy": {"value": right / len(arrays), "interval": [low, high]},
        "test_images": len(arrays),
        "head_inputs": features,
        "head_weights": features * len(arrays.classes),
        "distribution": {str(f): int(n) / len(arrays) for f, n in zip(ratios, counts, strict=True) if f},
        "skipped": arrays.record["skipped"],
        **facts,
    }


def result(
    task: str,
    data: str,
    rows: Sequence[dict[str, Any]],
    protocol: Mapping[str, Any],
    timing: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the result of all rows as JSON values."""
    return {
        "evaluation": "classification",
        "task": task,
        "data": {"path": data},
        "rows": list(rows),
        "protocol": dict(protocol),
        "intervals": "95 %, Wilson",
        "versions": versions(),
        "timing": dict(timing),
    }
