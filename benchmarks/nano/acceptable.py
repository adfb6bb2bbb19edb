"""Maximum acceptable ratio of each image, and how well metrics known before encoding predict it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cat_fast.complexity import jpeg_bytes
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop

TOLERANCE = 0.0015
"""Largest acceptable increase of the squared error over the best ratio's, images in [-1, 1] (section 3.1)."""


def maximum_acceptable_ratio(psnr: dict[str, float], tolerance: float = TOLERANCE) -> int:
    """Return the largest ratio whose mean squared error is within `tolerance` of the best one's.

    Args:
        psnr: PSNR in dB by ratio.
    """
    errors = {int(ratio): 4 / 10 ** (decibels / 10) for ratio, decibels in psnr.items()}
    best = min(errors.values())
    return max(ratio for ratio, error in errors.items() if error <= best + tolerance)


def correlations(
    records: Sequence[ImageRecord],
    figures: Sequence[dict[str, Any]],
    scores: dict[str, float],
    chosen: dict[str, int],
    side: int,
) -> dict[str, Any]:
    """Return Pearson correlations of metrics with minus the maximum acceptable ratio.

    Args:
        figures: psnr and st_lpips by ratio of each record.
        scores: expected complexity score by key.
        chosen: ratio by key.
        side: side of the images in pixels.
    """
    best = np.array([maximum_acceptable_ratio(one["psnr"]) for one in figures])
    metrics: dict[str, list[float]] = {
        "complexity score": [scores[one.key] for one in records],
        "JPEG bytes": [_jpeg_bytes(one, side) for one in records],
        "caption length": [len(one.caption) for one in records],
        "squared error at 16x": [4 / 10 ** (one["psnr"]["16"] / 10) for one in figures],
        "ST-LPIPS at 16x": [one["st_lpips"]["16"] for one in figures],
    }
    return {
        "images": len(records),
        "mix of maximum acceptable ratios": {
            f"{ratio}x": int((best == ratio).sum()) for ratio in (8, 16, 32)
        },
        "chosen equals maximum acceptable": float(
            np.mean([chosen[one.key] == ratio for one, ratio in zip(records, best, strict=True)])
        ),
        "correlation": {name: _pearson(values, -best) for name, values in metrics.items()},
    }


def _pearson(values: Sequence[float], other: np.ndarray) -> float | None:
    """Return the correlation; None if one of the two is constant."""
    if np.ptp(values) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(values, other)[0, 1])


def _jpeg_bytes(record: ImageRecord, side: int) -> int:
    image = image_to_tensor(resize_center_crop(load_image(record.path), side))
    return jpeg_bytes(((image / 2 + 0.5) * 255).round().byte())
