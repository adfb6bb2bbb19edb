"""Fit of the accurate scorer's kernel regression."""

from collections.abc import Sequence

import numpy as np

from cat_fast.complexity.rated_captions import RatedCaption
from cat_fast.complexity.scorers.accurate.kernel_model import (
    ADDED,
    STATES,
    FeatureMap,
    KernelModel,
    flag_kernel,
    gaussian_kernel,
    restore,
    store,
)

WIDTH = 384
"""Number of features."""
PENALTY = 0.1
SINGLE_RATING_PENALTY = 0.16
"""Ridge penalty of captions with one rating, whose error is larger."""


def fit_kernel_model(features: FeatureMap, pooled: np.ndarray, rated: Sequence[RatedCaption]) -> KernelModel:
    """Fit the regression to rated captions whose flags are all given.

    Args:
        features: map of pooled states to features.
        pooled: pooled states of each caption, float32 (N, K).
        rated: the captions.
    """
    landmarks = store(features(pooled))
    points = restore(landmarks)
    flags = np.array([_signs(row) for row in rated], dtype=np.float32)
    means = np.array([row.mean for row in rated])
    penalty = np.array([SINGLE_RATING_PENALTY if len(r.ratings) == 1 else PENALTY for r in rated])

    flag_weights, flag_centers = _solve(gaussian_kernel(points, points), flags, penalty)
    gram = gaussian_kernel(points, points)
    gram *= flag_kernel(flags, flags)
    gram += ADDED / 2 * (flags @ flags.T)
    weights, center = _solve(gram, means[:, None], penalty)
    per_state = weights * flag_kernel(STATES, flags).T
    added = ADDED / 2 * (STATES @ (flags.T @ weights))[:, 0]
    return KernelModel(
        features,
        landmarks,
        np.concatenate([per_state, flag_weights], 1).astype(np.float32),
        np.concatenate([center + added, flag_centers]).astype(np.float32),
    )


def _solve(gram: np.ndarray, targets: np.ndarray, penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights (N, T) of the landmarks and the mean of the targets (T,); overwrites `gram`."""
    from scipy.linalg import cho_factor, cho_solve

    gram[np.diag_indices(len(gram))] += penalty.astype(gram.dtype)
    center = targets.mean(0)
    factor = cho_factor(gram, lower=True, overwrite_a=True, check_finite=False)
    return cho_solve(factor, (targets - center).astype(gram.dtype)), center


def _signs(row: RatedCaption) -> tuple[int, int]:
    """Return the flags (text, faces) as -1 or 1."""
    return 2 * bool(row.description.has_text) - 1, 2 * bool(row.description.has_faces) - 1
