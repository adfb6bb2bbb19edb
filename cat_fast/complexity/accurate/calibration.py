"""Calibration of the accurate scorer: ratio boundaries and confidence, apart for known and unknown flags."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RATIO_BOUNDARIES = (4.5, 7.5)
"""Expected scores at which the integer score passes the published thresholds."""
REACH = 0.8
"""Distance from a boundary up to which predictions are moved."""


@dataclass(frozen=True)
class RawPredictions:
    """Predictions of both parts of the scorer, before calibration."""

    ratings: np.ndarray
    """Probabilities of the ratings 1..9 by the adapted encoder, float64 (N, 9)."""
    kernel: np.ndarray
    """Scores by the kernel regression, float64 (N,)."""

    @classmethod
    def join(cls, parts: Sequence["RawPredictions"]) -> "RawPredictions":
        """Return the predictions of all parts, one after the other."""
        return cls(np.concatenate([p.ratings for p in parts]), np.concatenate([p.kernel for p in parts]))

    @property
    def adapted(self) -> np.ndarray:
        """Expected rating by the adapted encoder, (N,)."""
        return (self.ratings * np.arange(1.0, 10.0)).sum(1)  # unlike a product, equal for any number of rows

    @property
    def expected(self) -> np.ndarray:
        """Mean of both parts, in [1, 9], (N,)."""
        return np.clip((self.adapted + self.kernel) / 2, 1, 9)


@dataclass(frozen=True)
class Calibration:
    """Maps raw predictions to expected scores and confidences."""

    boundaries: np.ndarray
    """Predictions that map to `RATIO_BOUNDARIES`, float64 (2,)."""
    confidence: np.ndarray
    """Coefficients of the log-odds of the confidence, and the intercept, float64 (4,)."""

    @classmethod
    def fit(cls, raw: RawPredictions, means: np.ndarray) -> "Calibration":
        """Fit to predictions of captions that the models were not fitted on, and their mean ratings (N,).

        As many predictions as mean ratings lie below each boundary: least squares draws predictions towards
        the mean, and a mean rating of 4.5, half a point above the boundary of 4, has the next ratio.
        """
        from sklearn.linear_model import LogisticRegression

        ordered = np.sort(raw.expected)
        counts = [int((means <= int(boundary)).sum()) for boundary in RATIO_BOUNDARIES]
        boundaries = np.array([(ordered[n - 1] + ordered[n]) / 2 for n in counts])
        unfitted = cls(boundaries, np.zeros(4))
        score = np.floor(unfitted.expected(raw) + 0.5)
        right = np.abs(score - means) <= 0.5
        model = LogisticRegression().fit(unfitted._signals(raw), right)
        return cls(boundaries, np.array([*model.coef_[0], model.intercept_[0]]))

    def expected(self, raw: RawPredictions) -> np.ndarray:
        """Return expected scores, float64 in [1, 9], (N,)."""
        at, to = [1.0], [1.0]
        for found, boundary in zip(self.boundaries, RATIO_BOUNDARIES, strict=True):
            at += [found - REACH, found, found + REACH]
            to += [found - REACH, boundary, found + REACH]
        return np.interp(raw.expected, [*at, 9.0], [*to, 9.0])

    def confidences(self, raw: RawPredictions) -> np.ndarray:
        """Return the estimated probability that the mean rating is within 0.5 of the score, float64 (N,)."""
        log_odds = (self._signals(raw) * self.confidence[:-1]).sum(1) + self.confidence[-1]
        return 1 / (1 + np.exp(-log_odds))

    def _signals(self, raw: RawPredictions) -> np.ndarray:
        expected = self.expected(raw)
        score = np.floor(expected + 0.5)
        share = raw.ratings[np.arange(len(score)), score.astype(int) - 1].clip(0.01, 0.99)
        signals = [np.log(share / (1 - share)), np.abs(raw.adapted - raw.kernel), np.abs(expected - score)]
        return np.stack(signals, 1)
