"""Ratios of scored samples: by thresholds, or within a budget over all samples."""

import numpy as np

from cat_fast.complexity.ratios.budget import ratios_within_budget
from cat_fast.complexity.ratios.mix import RATIOS, require_budget, token_costs
from cat_fast.complexity.ratios.thresholds import RatioThresholds

RESOLUTION, PATCH_SIZE = 512, 2
"""Images that tokens are for."""
TOKENS = dict(zip(RATIOS, token_costs(RATIOS, RESOLUTION, PATCH_SIZE), strict=True))
"""Tokens of an image per ratio."""


def require_enough(mean_tokens: float | None) -> None:
    """Raise UserError if a budget of mean tokens is too small for a sample."""
    if mean_tokens is not None:
        require_budget(mean_tokens, RATIOS, tuple(TOKENS.values()), RESOLUTION)


def decide(
    scores: np.ndarray, expected: np.ndarray, thresholds: RatioThresholds, mean_tokens: float | None = None
) -> np.ndarray:
    """Return the ratio of each sample, int32 (N,).

    Args:
        scores: integer scores 1..9, (N,).
        expected: expected scores, (N,).
        thresholds: as for `RatioThresholds.ratio_of`.
        mean_tokens: budget that the mean tokens come as close to as possible without exceeding it
            (`ratios_within_budget`, on the expected scores); None to use `thresholds` alone.
    """
    values = expected if thresholds.use_expected else scores
    exceeded = (values[:, None] > np.asarray(thresholds.values)).sum(axis=1)
    ratios = np.asarray(thresholds.ratio_set[::-1], dtype=np.int32)[exceeded]
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
