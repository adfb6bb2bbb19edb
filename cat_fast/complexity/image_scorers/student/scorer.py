"""`ImageStudent`: the default scorer of images without a description."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from cat_fast.complexity.array_file import read_arrays, save_arrays, version_of
from cat_fast.complexity.image_score import GivenLabels, ImageScore
from cat_fast.complexity.image_scorers.student import features as image_features
from cat_fast.complexity.image_scorers.student import low_level
from cat_fast.complexity.image_scorers.student.features import Features
from cat_fast.complexity.image_scorers.student.model import Regression, RegressionArrays
from cat_fast.complexity.image_scorers.student.trunk import Trunk
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.data.images.label_fields import SCORES

STUDENT_FILE = Path(__file__).parents[2] / "assets" / "image_student.npz"
"""The packaged student."""
_TRUNK = "trunk/"
_TEXTURES = "textures and parts"
"""Name of the features of the convolutions in `ImageStudent.contributions`."""


@dataclass(frozen=True)
class StudentCalibration:
    """Monotone map of predictions to expected scores with the distribution of the ratings, and confidences.

    Args:
        predictions: ascending, (K,).
        scores: expected scores that they map to, ascending from at least 1 to at most 9, (K,).
        confidence: probability per integer score 1..9 that the mean rating is within 0.5 of it, (9,).
    """

    predictions: np.ndarray
    scores: np.ndarray
    confidence: np.ndarray

    def expected(self, predictions: np.ndarray) -> np.ndarray:
        """Return expected scores, (N,)."""
        return np.interp(predictions, self.predictions, self.scores)


@dataclass(frozen=True)
class ImageStudent:
    """Frozen convolutions and low-level features, a regression on them, and its calibration.

    A score depends on the image alone, not on the other images of a call.
    """

    trunk: Trunk
    regression: Regression
    calibration: StudentCalibration

    name: ClassVar[str] = "image_student"

    @classmethod
    def load(cls, path: Path = STUDENT_FILE) -> "ImageStudent":
        """Load a student.

        Raises:
            UserError: the file is missing or does not contain a student.
        """
        return read_arrays(path, "image student", cls._parse)

    def save(self, path: Path) -> None:
        """Save the student as plain arrays (npz, no pickle)."""
        save_arrays(path, self._arrays())

    @cached_property
    def version(self) -> str:
        """Hash of all arrays."""
        return version_of(self._arrays())

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return the image at the two sizes that features are computed from."""
        return image_features.prepare(image)

    def score_images(
        self, images: Sequence[Image.Image], given: Sequence[GivenLabels] = ()
    ) -> list[ImageScore | ScoringFailure]:
        """Score each prepared image, in order."""
        return [ImageScore(self._score(image_features.compute(image, self.trunk))) for image in images]

    def explain(self, image: Image.Image) -> tuple[Score, list[tuple[str, float]]]:
        """Return the score of an image, and the change of its expected score by each group of features.

        A group's change is against its mean over the training images; the largest magnitude is first.

        Args:
            image: from `prepare`.
        """
        found, means = image_features.compute(image, self.trunk), self.regression.arrays
        without = {_TEXTURES: Features(means.trunk_mean, found.low)}
        for name, group in low_level.GROUPS.items():
            low = found.low.copy()
            low[group] = means.low_mean[group]
            without[name] = Features(found.trunk, low)
        cases = [found, *without.values()]
        rows = Features(np.stack([case.trunk for case in cases]), np.stack([case.low for case in cases]))
        expected, *others = self.calibration.expected(self.regression.predict(rows)).tolist()
        effects = [(name, expected - other) for name, other in zip(without, others, strict=True)]
        return self._score(found), sorted(effects, key=lambda effect: -abs(effect[1]))

    def _score(self, found: Features) -> Score:
        rows = Features(found.trunk[None], found.low[None])
        expected = float(self.calibration.expected(self.regression.predict(rows))[0])
        score = Score.of_expected(min(max(expected, SCORES[0]), SCORES[-1]))
        return Score(score.score, score.expected, float(self.calibration.confidence[score.score - 1]))

    @classmethod
    def _parse(cls, arrays: Mapping[str, np.ndarray]) -> "ImageStudent":
        return cls(
            Trunk({n.removeprefix(_TRUNK): a for n, a in arrays.items() if n.startswith(_TRUNK)}),
            Regression(RegressionArrays.of(arrays)),
            StudentCalibration(arrays["predictions"], arrays["scores"], arrays["confidence"]),
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        found: Mapping[str, Any] = {
            **{f"{_TRUNK}{name}": array for name, array in self.trunk.weights.items()},
            **vars(self.regression.arrays),
            **vars(self.calibration),
        }
        return {name: np.asarray(array, order="C") for name, array in found.items()}


@cache
def image_student() -> ImageStudent:
    """Return the packaged student, loaded once."""
    return ImageStudent.load()
