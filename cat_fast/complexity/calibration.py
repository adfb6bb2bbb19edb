"""Calibration of predictions, so that the integer score has the raters' ratios and a known reliability."""

from dataclasses import dataclass

import numpy as np

RATIO_BOUNDARIES = (4.5, 7.5)
"""Expected scores at which the integer score passes the published thresholds 4 and 7."""
REACH = 0.8
"""Distance from a boundary up to which predictions are moved."""


@dataclass(frozen=True)
class Boundaries:
    """A monotone map of predictions that moves two of them to `RATIO_BOUNDARIES`.

    Least squares draws predictions towards the mean, and a mean rating of 4.5, half a point above 4, has the
    next ratio. As many predictions as mean ratings shall lie below each boundary.
    """

    low: float
    """Prediction that maps to 4.5."""
    high: float
    """Prediction that maps to 7.5."""

    @classmethod
    def fit(cls, predictions: np.ndarray, means: np.ndarray) -> "Boundaries":
        """Fit to predictions of captions that the model was not fitted on, and their mean ratings, (N,)."""
        ordered = np.sort(predictions)
        counts = [int((means <= int(boundary)).sum()) for boundary in RATIO_BOUNDARIES]
        return cls(*(float((ordered[n - 1] + ordered[n]) / 2) for n in counts))

    def move(self, predictions: np.ndarray) -> np.ndarray:
        """Return expected scores, float64 in [1, 9], (N,)."""
        at, to = [1.0], [1.0]
        for found, boundary in zip((self.low, self.high), RATIO_BOUNDARIES, strict=True):
            at += [found - REACH, found, found + REACH]
            to += [found - REACH, boundary, found + REACH]
        return np.interp(predictions, [*at, 9.0], [*to, 9.0])
