"""Fitting the embedded scorer: regression, calibration, cross-validated quality, thresholds.

The reported quality is out of fold: a caption is judged by a model that has not seen it, through cut points
that have not seen it either.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cat_fast.complexity.calibration import expected_scores, fit_knots, whole_scores
from cat_fast.complexity.description import Description
from cat_fast.complexity.embedded_scorer import EmbeddedScorer
from cat_fast.complexity.features import FeatureSpace
from cat_fast.complexity.ratio import SCORES, RatioThresholds, mean_tokens
from cat_fast.errors import UserError

FOLDS = 5
RIDGE_PENALTY = 1.0
"""The best in cross-validation; a third of it and three times it lower the correlation by under 0.01."""


@dataclass(frozen=True)
class Quality:
    """Agreement of predicted scores with given ones."""

    pearson: float
    """Correlation of the score before rounding."""
    mae: float
    """Mean absolute error of the score before rounding."""
    exact: float
    """Share of whole scores that agree."""
    within_one: float
    """Share of whole scores at most 1 apart."""

    @classmethod
    def of(cls, expected: np.ndarray, given: np.ndarray) -> "Quality":
        """Quality of `expected` (N,), predictions on the score scale, against the scores `given` (N,)."""
        apart = np.abs(whole_scores(expected) - given)
        return cls(
            pearson=float(np.corrcoef(expected, given)[0, 1]),
            mae=float(np.abs(expected - given).mean()),
            exact=float((apart == 0).mean()),
            within_one=float((apart <= 1).mean()),
        )


@dataclass(frozen=True)
class Fit:
    """A fitted scorer and what is known about it."""

    scorer: EmbeddedScorer
    thresholds: RatioThresholds
    quality: Quality
    """Of out-of-fold predictions."""
    out_of_fold: np.ndarray
    """Out-of-fold scores, int (N,), which the thresholds were fitted to."""

    def report(self, descriptions: Sequence[Description]) -> dict:
        """The figures as JSON values; `descriptions` are those of the fit."""
        in_sample = self.scorer.score_many(descriptions)
        return {
            "captions": len(descriptions),
            "folds": FOLDS,
            "cross_validation": asdict(self.quality),
            "thresholds": asdict(self.thresholds),
            "budget": {
                name: {"mix": (mix := self.thresholds.mix(scores)), "mean_tokens_512px": mean_tokens(mix)}
                for name, scores in (("out_of_fold", self.out_of_fold), ("in_sample", in_sample))
            },
        }


def fit(descriptions: Sequence[Description], given: Sequence[int]) -> Fit:
    """Fit scorer and thresholds to descriptions and the scores 1..9 given to them.

    Raises:
        UserError: lengths differ, a score has fewer than five captions, or no thresholds meet the budget of a
            fixed 16x tokenizer.
    """
    if len(descriptions) != len(given):
        raise UserError(f"each description needs one score, got {len(descriptions)} and {len(given)}")
    scores = np.array(given)
    rarest = min(SCORES, key=lambda score: (scores == score).sum())
    if (scores == rarest).sum() < FOLDS:
        raise UserError(
            f"fitting needs at least {FOLDS} captions of every score from 1 to 9; there are fewer of {rarest}"
        )

    raw, fold = _predict_out_of_fold(descriptions, scores)
    unseen = np.zeros(len(scores))
    for k in range(FOLDS):
        knots = fit_knots(raw[fold != k], scores[fold != k])
        unseen[fold == k] = expected_scores(raw[fold == k], knots)

    knots = fit_knots(raw, scores)
    out_of_fold = whole_scores(expected_scores(raw, knots))
    return Fit(
        EmbeddedScorer(*_regress(descriptions, scores), knots),
        RatioThresholds.fit(out_of_fold),
        Quality.of(unseen, scores),
        out_of_fold,
    )


def _predict_out_of_fold(
    descriptions: Sequence[Description], scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each description the prediction by the other folds' model, float64 (N,), and its fold, int (N,)."""
    from sklearn.model_selection import StratifiedKFold

    raw, fold = np.zeros(len(scores)), np.zeros(len(scores), dtype=int)
    splits = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(scores, scores)
    for k, (seen, held_out) in enumerate(splits):
        space, coefficients, intercept = _regress([descriptions[i] for i in seen], scores[seen])
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
