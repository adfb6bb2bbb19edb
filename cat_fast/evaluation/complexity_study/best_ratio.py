"""The maximum acceptable ratio of an image, f*, from its reconstruction errors."""

import numpy as np

PUBLISHED_TAU = 0.0015
"""Tolerance of the published correlations and agreement, on pixels in [0, 1]."""
TAUS = (0.0001, 0.0002, 0.0005, 0.001, 0.0015, 0.002, 0.005, 0.01)
"""Tolerances of the study."""


def best_ratios(errors: np.ndarray, ratios: np.ndarray, tau: float) -> np.ndarray:
    """Return f*(tau) per image, (N,): the largest ratio whose MSE is within `tau` of the best one.

    Args:
        errors: MSE of each image at each ratio, (N, R).
        ratios: compression ratios, (R,), ascending.
        tau: tolerance in the unit of `errors`.
    """
    acceptable = errors - errors.min(axis=1, keepdims=True) <= tau
    return ratios[acceptable.shape[1] - 1 - acceptable[:, ::-1].argmax(axis=1)]


def share_losing_less(errors: np.ndarray, tau: float) -> float:
    """Return the share of images whose MSE at the largest ratio exceeds that at the smallest by less than
    `tau`."""
    return float((errors[:, -1] - errors[:, 0] < tau).mean())
