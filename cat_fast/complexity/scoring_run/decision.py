"""Ratios of scored samples: by thresholds, or within a budget over all samples."""

import numpy as np

from cat_fast.complexity.budget import ratios_within_budget
from cat_fast.complexity.ratio import RATIOS, RatioThresholds, tokens_per_image
from cat_fast.data.images.label_fields import SCORES

RESOLUTION, PATCH_SIZE = 512, 2
"""Images that tokens are for."""
TOKENS = {ratio: tokens_per_image(ratio, RESOLUTION, PATCH_SIZE) for ratio in RATIOS}


def require_budget(mean_tokens: float | None) -> None:
    """Raise UserError if a budget of mean tokens is too small for a sample."""
    if mean_tokens is not None:
        ratios_within_budget([1.0], mean_tokens, resolution=RESOLUTION, patch_size=PATCH_SIZE)


def decide(
    scores: np.ndarray, expected: np.ndarray, thresholds: RatioThresholds, mean_tokens: float | None = None
) -> np.ndarray:
    """Return the ratio of each sample, int32 (N,).

    Args:
        scores: integer scores 1..9, (N,).
        expected: expected scores, (N,).
        mean_tokens: budget that the mean tokens come as close to as possible without exceeding it
            (`ratios_within_budget`, on the expected scores); None to use `thresholds` alone.
    """
    by_score = np.zeros(SCORES[-1] + 1, dtype=np.int32)
    by_score[list(SCORES)] = thresholds.ratios(SCORES)
    ratios = by_score[scores]
    if mean_tokens is None:
        return ratios
    chosen = ratios_within_budget(
        expected.tolist(),
        mean_tokens,
        resolution=RESOLUTION,
        patch_size=PATCH_SIZE,
        preferred=ratios.tolist(),
    )
    return np.asarray(chosen, dtype=np.int32)
