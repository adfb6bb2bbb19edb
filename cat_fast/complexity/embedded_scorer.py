"""The scorer that is always there: a linear model on a description's words, shipped with the package.

It stands in for a language model that reads the rubric (`cat_fast.complexity.rubric`) and needs no download.
`cat_fast.complexity.fitting` says how it is fitted; its report, `REPORT_FILE`, how well it does.
"""

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cat_fast.complexity.calibration import expected_scores, whole_scores
from cat_fast.complexity.description import Description
from cat_fast.complexity.features import FeatureSpace
from cat_fast.complexity.ratio import RatioThresholds
from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError

SCORER_FILE = Path(__file__).parent / "assets" / "embedded_scorer.npz"
REPORT_FILE = SCORER_FILE.with_suffix(".json")
"""How the shipped scorer was fitted, its cross-validated quality and the thresholds that go with it."""


@dataclass(frozen=True)
class EmbeddedScorer:
    """Ridge regression on `FeatureSpace` columns, then the monotone map of `calibration`."""

    space: FeatureSpace
    coefficients: np.ndarray
    """One for each column of the feature space, float64."""
    intercept: float
    knots: np.ndarray
    """Predictions that mean `calibration.KNOT_SCORES`, float64 (10,)."""

    @classmethod
    def load(cls, path: Path | str | None = None) -> "EmbeddedScorer":
        """The scorer stored at `path`, by default the one that ships with the package.

        Raises:
            UserError: there is no such file, or it does not hold a scorer.
        """
        path = SCORER_FILE if path is None else Path(path)
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in _ARRAYS}
            space = FeatureSpace(*(arrays[name] for name in _SPACE_ARRAYS))
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such scorer file") from None
        except _NO_SCORER as error:
            raise UserError(
                f"{path}: not a scorer file ({error}); cat_fast.complexity.fitting makes one"
            ) from error
        return cls(space, arrays["coefficients"], float(arrays["intercept"]), arrays["knots"])

    def save(self, path: Path) -> None:
        """Store the scorer as plain arrays (npz, no pickle): wholly or not at all."""
        arrays = {name: getattr(self.space, name) for name in _SPACE_ARRAYS}
        arrays |= {
            "coefficients": self.coefficients,
            "intercept": np.array(self.intercept),
            "knots": self.knots,
        }
        with atomic_write(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def score(self, description: Description) -> int:
        """Complexity score 1..9."""
        return self.score_many([description])[0]

    def score_many(self, descriptions: Sequence[Description]) -> list[int]:
        """Complexity score 1..9 of each description, in order."""
        return whole_scores(self.expected_many(descriptions)).tolist()

    def expected(self, description: Description) -> float:
        """The score before rounding, in [1, 9]."""
        return float(self.expected_many([description])[0])

    def expected_many(self, descriptions: Sequence[Description]) -> np.ndarray:
        """`expected` of each description, in order, float64 (len(descriptions),)."""
        return expected_scores(self.predict(descriptions), self.knots)

    def contributions(self, description: Description) -> list[tuple[str, float]]:
        """What speaks for a higher or a lower score, the strongest first: (feature, what it adds).

        With the intercept they sum to `predict`.
        """
        row = self.space.matrix([description])
        names = self.space.names()
        parts = [
            (names[j], float(v * self.coefficients[j])) for j, v in zip(row.indices, row.data, strict=True)
        ]
        return sorted(parts, key=lambda part: -abs(part[1]))

    def predict(self, descriptions: Sequence[Description]) -> np.ndarray:
        """The regression's own output before it is mapped onto the scale, float64 (len(descriptions),)."""
        if not descriptions:
            return np.zeros(0)
        # A sparse product sums in column order: the same bits in every process, on any number of threads.
        return self.space.matrix(descriptions) @ self.coefficients + self.intercept


_SPACE_ARRAYS = ("words", "word_idf", "chars", "char_idf")
_ARRAYS = (*_SPACE_ARRAYS, "coefficients", "intercept", "knots")
_NO_SCORER = (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error)
"""What numpy raises, depending on where it notices that a file is something else or is damaged."""


@cache
def default_scorer() -> EmbeddedScorer:
    """The scorer that ships with the package, loaded once."""
    return EmbeddedScorer.load()


@cache
def default_thresholds() -> RatioThresholds:
    """Thresholds fitted to the shipped scorer: over its captions they cost about what a fixed 16x does."""
    fitted = json.loads(REPORT_FILE.read_text(encoding="utf-8"))["thresholds"]
    return RatioThresholds(fitted["a"], fitted["b"])
