"""A monotone map from a regression's predictions onto the score scale, so that their distributions agree.

Least squares shrinks predictions towards the mean: hardly any image would get a 1 or a 9, and a token
budget that was balanced on the given scores would be missed.
"""

import numpy as np

from cat_fast.complexity.ratio import SCORES

KNOT_SCORES = np.array([1, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9])
"""Where the map is pinned: the ends of the scale and the borders between the scores."""


def fit_knots(predictions: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Predictions that are to mean `KNOT_SCORES`, float64 (10,), ascending.

    As many predictions come to lie between two borders as there are given scores of that value. `predictions`
    (N,) must be of descriptions that the regression was not fitted on, for those are less spread out; `given`
    (N,) holds every score 1..9.
    """
    ordered = np.sort(predictions)
    upto = np.array([(given <= score).sum() for score in SCORES[:-1]])
    borders = (ordered[upto - 1] + ordered[upto]) / 2
    return np.concatenate([ordered[:1], borders, ordered[-1:]])


def expected_scores(predictions: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Predictions on the score scale, float64 in [1, 9], linear between the knots."""
    return np.interp(predictions, knots, KNOT_SCORES)


def whole_scores(expected: np.ndarray) -> np.ndarray:
    """Expected scores rounded to 1..9, int64."""
    return np.clip(np.floor(expected + 0.5), SCORES[0], SCORES[-1]).astype(np.int64)
