"""Monotone calibration of regression outputs to the score scale, so that both distributions agree.

Least squares shrinks predictions towards the mean: almost no image would get a 1 or a 9, and a token budget
balanced on the target scores would be missed.
"""

import numpy as np

from cat_fast.data.images.label_fields import SCORES

KNOT_SCORES = np.array([1, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9])
"""Scores at the knots of the map: both ends of the scale and the boundaries between scores."""


def fit_knots(predictions: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the predictions that map to `KNOT_SCORES`, float64 (10,), ascending.

    Between two boundaries there are as many predictions as target scores of that value.

    Args:
        predictions: (N,), of descriptions that the regression was not fitted on; fitted ones spread too far.
        scores: target scores, (N,); every score 1..9 must occur.
    """
    ordered = np.sort(predictions)
    cumulative = np.array([(scores <= score).sum() for score in SCORES[:-1]])
    boundaries = (ordered[cumulative - 1] + ordered[cumulative]) / 2
    return np.concatenate([ordered[:1], boundaries, ordered[-1:]])


def calibrate(predictions: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Map predictions to continuous scores, float64 in [1, 9], linearly between the knots."""
    return np.interp(predictions, knots, KNOT_SCORES)


def round_scores(continuous: np.ndarray) -> np.ndarray:
    """Round continuous scores to 1..9, int64."""
    return np.clip(np.floor(continuous + 0.5), SCORES[0], SCORES[-1]).astype(np.int64)
