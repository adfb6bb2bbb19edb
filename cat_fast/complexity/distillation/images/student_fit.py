"""The image student: the best candidate of the trials, fitted to all images and calibrated out of fold."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cat_fast.complexity.distillation.images.image_data import ImageData
from cat_fast.complexity.distillation.images.trials import CANDIDATES, HEADS, Trial, fit_cuts
from cat_fast.complexity.distillation.quality import ratios_of
from cat_fast.complexity.image_scorers.student.scorer import ImageStudent, StudentCalibration
from cat_fast.complexity.image_scorers.student.trunk import Trunk
from cat_fast.complexity.score import round_score
from cat_fast.data.images.label_fields import SCORES

_BOUNDARIES = (4.5, 7.5)
"""Expected scores at which the integer score passes the published thresholds."""
_TAIL = 0.01
_PRIOR = 10.0
"""Images that the confidence of a rare score is smoothed with."""


def best_candidate(table: Mapping[str, Any]) -> str:
    """Return the candidate with the highest mean rank correlation on rated and on further images."""
    tried = [name for name in CANDIDATES if name in table]
    return max(
        tried, key=lambda name: table[name]["spearman"]["value"] + (table[name]["spearman_further"] or 0)
    )


def fit_student(data: ImageData, trunk: Trunk, name: str, trial: Trial) -> ImageStudent:
    """Fit the head `name` to all images; calibrate it with its predictions out of fold.

    Args:
        data: rated and further images.
        trial: the trial of this head.
    """
    assert trial.penalty is not None
    regression = HEADS[name].fit(data, trial.penalty)
    calibration = _calibrate(trial.predictions, data.targets[data.rated])
    return ImageStudent(trunk, regression, calibration)


def _calibrate(predictions: np.ndarray, means: np.ndarray) -> StudentCalibration:
    """Map predictions to expected scores with the raters' mix of ratios, and estimate confidences."""
    low, high = fit_cuts(predictions, ratios_of(means))
    at = [float(np.quantile(predictions, _TAIL)), low, high, float(predictions.max())]
    to = [float(np.quantile(means, _TAIL)), *_BOUNDARIES, float(means.max())]
    knots = np.maximum.accumulate(at) + 1e-6 * np.arange(len(at))  # strictly ascending
    found = StudentCalibration(knots, np.array(to), np.full(len(SCORES), 0.5))
    scores = np.array([round_score(value) for value in found.expected(predictions)])
    right = np.abs(scores - means) <= 0.5
    confidence = np.array(
        [
            (right[scores == score].sum() + _PRIOR * right.mean()) / ((scores == score).sum() + _PRIOR)
            for score in SCORES
        ]
    )
    return StudentCalibration(knots, np.array(to), confidence)
