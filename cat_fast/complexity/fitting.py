"""Fitting of the embedded scorer: regression, calibration, cross-validated quality.

The reported quality is out of fold: each caption is scored by a regression and a calibration that were fitted
without it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cat_fast.complexity.calibration import calibrate, fit_knots, round_scores
from cat_fast.complexity.description import Description
from cat_fast.complexity.embedded_scorer import EmbeddedScorer
from cat_fast.complexity.features import FeatureSpace
from cat_fast.data.images.label_fields import SCORES
from cat_fast.errors import UserError

FOLDS = 5
RIDGE_PENALTY = 1.0
"""Best value in cross-validation; a third or three times as much lowers the correlation by under 0.01."""


@dataclass(frozen=True)
class Quality:
    """Agreement of predicted scores with target scores."""

    pearson: float
    """Correlation of the score before rounding."""
    mae: float
    """Mean absolute error of the score before rounding."""
    exact: float
    """Share of rounded scores that agree."""
    within_one: float
    """Share of rounded scores that differ by at most 1."""

    @classmethod
    def measure(cls, continuous: np.ndarray, targets: np.ndarray) -> "Quality":
        """Compare `continuous` (N,), scores before rounding, with the target scores (N,)."""
        difference = np.abs(round_scores(continuous) - targets)
        return cls(
            pearson=float(np.corrcoef(continuous, targets)[0, 1]),
            mae=float(np.abs(continuous - targets).mean()),
            exact=float((difference == 0).mean()),
            within_one=float((difference <= 1).mean()),
        )


@dataclass(frozen=True)
class FitResult:
    """A fitted scorer with its cross-validation results."""

    scorer: EmbeddedScorer
    quality: Quality
    """Quality of the out-of-fold predictions."""
    out_of_fold: np.ndarray
    """Out-of-fold scores, int (N,)."""

    def report(self) -> dict:
        """Return the fit report as JSON values."""
        return {
            "captions": len(self.out_of_fold),
            "folds": FOLDS,
            "cross_validation": asdict(self.quality),
        }


def fit(descriptions: Sequence[Description], scores: Sequence[int]) -> FitResult:
    """Fit a scorer to descriptions with target scores 1..9.

    Raises:
        UserError: lengths differ, or a score has fewer than five captions.
    """
    if len(descriptions) != len(scores):
        raise UserError(
            f"each description needs one score, got {len(descriptions)} descriptions and {len(scores)} scores"
        )
    targets = np.array(scores)
    rarest = min(SCORES, key=lambda score: (targets == score).sum())
    if (number := (targets == rarest).sum()) < FOLDS:
        raise UserError(
            f"fitting needs at least {FOLDS} captions of every score from 1 to 9,"
            f" got {number} of score {rarest}"
        )

    raw, fold = _predict_out_of_fold(descriptions, targets)
    continuous = np.zeros(len(targets))
    for k in range(FOLDS):
        knots = fit_knots(raw[fold != k], targets[fold != k])
        continuous[fold == k] = calibrate(raw[fold == k], knots)

    knots = fit_knots(raw, targets)
    out_of_fold = round_scores(calibrate(raw, knots))
    return FitResult(
        EmbeddedScorer(*_regress(descriptions, targets), knots),
        Quality.measure(continuous, targets),
        out_of_fold,
    )


def _predict_out_of_fold(
    descriptions: Sequence[Description], scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return, per description, the prediction by the other folds' model, float64, and its fold, int; (N,)."""
    from sklearn.model_selection import StratifiedKFold

    raw, fold = np.zeros(len(scores)), np.zeros(len(scores), dtype=int)
    splits = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(scores, scores)
    for k, (fitted, held_out) in enumerate(splits):
        space, coefficients, intercept = _regress([descriptions[i] for i in fitted], scores[fitted])
        raw[held_out] = space.matrix([descriptions[i] for i in held_out]) @ coefficients + intercept
        fold[held_out] = k
    return raw, fold


def _regress(
    descriptions: Sequence[Description], scores: np.ndarray
) -> tuple[FeatureSpace, np.ndarray, float]:
    from sklearn.linear_model import Ridge

    space = FeatureSpace.fit(descriptions)
    ridge = Ridge(RIDGE_PENALTY, solver="sparse_cg", tol=1e-10).fit(space.matrix(descriptions), scores)
    return space, ridge.coef_, float(ridge.intercept_)
