"""Maximum acceptable ratio of each image, and how well metrics known before encoding predict it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.nano.chosen import RATIOS
from cat_fast.complexity import jpeg_bytes
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop
from cat_fast.evaluation.complexity_study.best_ratio import PUBLISHED_TAU, best_ratios
from cat_fast.evaluation.complexity_study.statistics import pearson


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
    best = best_ratios(
        np.array([[_squared_error(one["psnr"][str(ratio)]) for ratio in RATIOS] for one in figures]),
        np.array(RATIOS),
        PUBLISHED_TAU,
    )
    metrics: dict[str, list[float]] = {
        "complexity score": [scores[one.key] for one in records],
        "JPEG bytes": [_jpeg_bytes(one, side) for one in records],
        "caption length": [len(one.caption) for one in records],
        "squared error at 16x": [_squared_error(one["psnr"]["16"]) for one in figures],
        "ST-LPIPS at 16x": [one["st_lpips"]["16"] for one in figures],
    }
    return {
        "images": len(records),
        "mix of maximum acceptable ratios": {f"{ratio}x": int((best == ratio).sum()) for ratio in RATIOS},
        "chosen equals maximum acceptable": float(
            np.mean([chosen[one.key] == ratio for one, ratio in zip(records, best, strict=True)])
        ),
        "correlation": {name: _pearson(values, -best) for name, values in metrics.items()},
    }


def _pearson(values: Sequence[float], other: np.ndarray) -> float | None:
    """Return the correlation; None if one of the two is constant."""
    if np.ptp(values) == 0 or np.ptp(other) == 0:
        return None
    return float(pearson(np.asarray(values, dtype=np.float64), other.astype(np.float64)))


def _squared_error(psnr: float) -> float:
    """Return the mean squared error of pixels in [0, 1] for a PSNR in dB."""
    return 10 ** (-psnr / 10)


def _jpeg_bytes(record: ImageRecord, side: int) -> int:
    image = image_to_tensor(resize_center_crop(load_image(record.path), side))
    return jpeg_bytes(((image / 2 + 0.5) * 255).round().byte())
