"""Predictions of the accurate scorer's parts, and their calibration."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cat_fast.complexity.calibration import Boundaries
from cat_fast.complexity.description import Description
from cat_fast.complexity.scorers.accurate.kernel_model import STATES

FAST_SHARE = 0.25
"""Weight of the fast scorer in the mean; the two parts on the sentence encoder share the rest equally."""
SHARPNESS = 1.5
"""Power of the odds of inferred flags: raters decide as if they knew a flag, and rarely by a mean of both."""


@dataclass(frozen=True)
class StatePredictions:
    """Predictions of both parts on the sentence encoder, for each state of the flags."""

    ratings: np.ndarray
    """Probabilities of the ratings 1..9 by the adapted encoder in each of `STATES`, float64 (N, 4, 9)."""
    flags: np.ndarray
    """Probabilities of text and faces by the adapted encoder, float64 (N, 2)."""
    kernel: np.ndarray
    """Result of `KernelModel.predict`, float64 (N, 6)."""

    def resolve(self, descriptions: Sequence[Description], fast: np.ndarray) -> "RawPredictions":
        """Return the predictions for the given flags, and means over inferred ones.

        Args:
            descriptions: the descriptions, in order.
            fast: predictions of the fast scorer, float64 (N,).
        """
        inferred = (self.flags + np.clip((self.kernel[:, 4:] + 1) / 2, 0, 1)) / 2
        probability = state_probabilities(descriptions, inferred)
        ratings = (self.ratings * probability[:, :, None]).sum(1)
        return RawPredictions(ratings, (self.kernel[:, :4] * probability).sum(1), np.clip(fast, 1, 9))


@dataclass(frozen=True)
class RawPredictions:
    """Predictions of all parts of the scorer, before calibration."""

    ratings: np.ndarray
    """Probabilities of the ratings 1..9 by the adapted encoder, float64 (N, 9)."""
    kernel: np.ndarray
    """Scores by the kernel regression, float64 (N,)."""
    fast: np.ndarray
    """Scores by the fast scorer, float64 (N,)."""

    @classmethod
    def join(cls, parts: Sequence["RawPredictions"]) -> "RawPredictions":
        """Return the predictions of all parts, one after the other."""
        return cls(
            *(np.concatenate([getattr(p, name) for p in parts]) for name in ("ratings", "kernel", "fast"))
        )

    @property
    def adapted(self) -> np.ndarray:
        """Expected rating by the adapted encoder, (N,)."""
        return (self.ratings * np.arange(1.0, 10.0)).sum(1)  # unlike a product, equal for any number of rows

    @property
    def expected(self) -> np.ndarray:
        """Mean of all parts, in [1, 9], (N,)."""
        encoder = (self.adapted + self.kernel) / 2
        return np.clip((1 - FAST_SHARE) * encoder + FAST_SHARE * self.fast, 1, 9)


@dataclass(frozen=True)
class Calibration:
    """Maps raw predictions to expected scores and confidences."""

    boundaries: Boundaries
    confidence: np.ndarray
    """Coefficients of the log-odds of the confidence, and the intercept, float64 (4,)."""

    @classmethod
    def fit(cls, raw: RawPredictions, means: np.ndarray) -> "Calibration":
        """Fit to predictions of captions that the models were not fitted on, and their mean ratings (N,)."""
        from sklearn.linear_model import LogisticRegression

        unfitted = cls(Boundaries.fit(raw.expected, means), np.zeros(4))
        right = np.abs(np.floor(unfitted.expected(raw) + 0.5) - means) <= 0.5
        model = LogisticRegression().fit(unfitted._signals(raw), right)
        return cls(unfitted.boundaries, np.array([*model.coef_[0], model.intercept_[0]]))

    def expected(self, raw: RawPredictions) -> np.ndarray:
        """Return expected scores, float64 in [1, 9], (N,)."""
        return self.boundaries.move(raw.expected)

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


def state_probabilities(descriptions: Sequence[Description], inferred: np.ndarray) -> np.ndarray:
    """Return the probability of each of `STATES`, float64 (N, 4).

    Args:
        descriptions: the descriptions, whose given flags are certain.
        inferred: probabilities of text and faces, float64 (N, 2).
    """
    odds = inferred**SHARPNESS, (1 - inferred) ** SHARPNESS
    sharpened = odds[0] / (odds[0] + odds[1])
    result = np.ones((len(descriptions), len(STATES)))
    for flag, name in enumerate(("has_text", "has_faces")):
        given = [getattr(description, name) for description in descriptions]
        present = np.array(
            [p if g is None else g for g, p in zip(given, sharpened[:, flag].tolist(), strict=True)],
            dtype=float,
        )
        result *= np.where(STATES[:, flag] > 0, present[:, None], 1 - present[:, None])
    return result
