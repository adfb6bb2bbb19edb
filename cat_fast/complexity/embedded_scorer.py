"""The embedded scorer: a linear model on a description's words, packaged with the library.

It replaces a language model that follows the rubric (`cat_fast.complexity.rubric`) and needs no download.
See `cat_fast.complexity.fitting` for how it is fitted, and `REPORT_FILE` for its quality.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cat_fast.complexity.calibration import calibrate
from cat_fast.complexity.description import Description
from cat_fast.complexity.features import FeatureSpace
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError

SCORER_FILE = Path(__file__).parent / "assets" / "embedded_scorer.npz"
REPORT_FILE = SCORER_FILE.with_suffix(".json")
"""Fit report of the packaged scorer: cross-validated quality."""


@dataclass(frozen=True)
class EmbeddedScorer:
    """Ridge regression on `FeatureSpace` columns, followed by the monotone map of `calibration`."""

    space: FeatureSpace
    coefficients: np.ndarray
    """One per column of the feature space, float64."""
    intercept: float
    knots: np.ndarray
    """Predictions that map to `calibration.KNOT_SCORES`, float64 (10,)."""

    name: ClassVar[str] = "embedded"

    @cached_property
    def version(self) -> str:
        """Hash of the scorer's arrays; scorers with the same version give the same scores."""
        digest = hashlib.sha256()
        for array in self._arrays().values():
            digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:12]

    @classmethod
    def load(cls, path: Path | str | None = None) -> "EmbeddedScorer":
        """Load the scorer at `path`, by default the packaged one.

        Raises:
            UserError: the file is missing or does not contain a scorer.
        """
        path = SCORER_FILE if path is None else Path(path)
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in _ARRAYS}
            space = FeatureSpace(*(arrays[name] for name in _SPACE_ARRAYS))
        except FileNotFoundError:
            raise UserError(f"{path}: no such scorer file") from None
        except _LOAD_ERRORS as error:
            raise UserError(
                f"{path}: not a scorer file ({error}); create one with cat_fast.complexity.fitting"
            ) from error
        return cls(space, arrays["coefficients"], float(arrays["intercept"]), arrays["knots"])

    def save(self, path: Path) -> None:
        """Save the scorer atomically as plain arrays (npz, no pickle)."""
        with atomic_write(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **self._arrays())

    def _arrays(self) -> dict[str, Any]:
        return {name: getattr(self.space, name) for name in _SPACE_ARRAYS} | {
            "coefficients": self.coefficients,
            "intercept": np.array(self.intercept),
            "knots": self.knots,
        }

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        """Score each description, in order."""
        return [Score.of_expected(expected) for expected in self.continuous_scores(descriptions).tolist()]

    def continuous_scores(self, descriptions: Sequence[Description]) -> np.ndarray:
        """Return the score of each description before rounding, in order, float64 (len(descriptions),)."""
        return calibrate(self.predict(descriptions), self.knots)

    def contributions(self, description: Description) -> list[tuple[str, float]]:
        """Return (feature, contribution) pairs, largest magnitude first.

        The contributions and the intercept sum to `predict`.
        """
        row = self.space.matrix([description])
        names = self.space.names()
        parts = [
            (names[j], float(v * self.coefficients[j])) for j, v in zip(row.indices, row.data, strict=True)
        ]
        return sorted(parts, key=lambda part: -abs(part[1]))

    def predict(self, descriptions: Sequence[Description]) -> np.ndarray:
        """Return the regression output before calibration, float64 (len(descriptions),)."""
        if not descriptions:
            return np.zeros(0)
        # A sparse product sums in column order: bit-identical in every process and for any number of threads.
        return self.space.matrix(descriptions) @ self.coefficients + self.intercept


_SPACE_ARRAYS = ("words", "word_idf", "chars", "char_idf")
_ARRAYS = (*_SPACE_ARRAYS, "coefficients", "intercept", "knots")
_LOAD_ERRORS = (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error)
"""Errors that NumPy raises on files that are damaged or of another format."""


@cache
def default_scorer() -> EmbeddedScorer:
    """Return the packaged scorer, loaded once."""
    return EmbeddedScorer.load()
