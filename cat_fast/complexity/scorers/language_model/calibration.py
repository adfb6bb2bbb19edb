"""Monotone calibration of a language model's expected scores to human-like ratings, one file per model."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cat_fast.complexity.rated_captions import RatedCaption
from cat_fast.complexity.score import Score, Scorer, round_score
from cat_fast.data.files import atomic_write
from cat_fast.data.text_files import parse_object, read_text
from cat_fast.errors import UserError

MIN_CAPTIONS = 50
"""Smallest number of scored captions to fit a calibration on."""
_GROUP = 25
"""Smallest number of captions per knot."""
_MAX_KNOTS = 20


@dataclass(frozen=True)
class ScoreCalibration:
    """Monotone map from a scorer's expected scores to mean ratings, linear between knots.

    Raises:
        UserError: the knots do not ascend or are out of range.
    """

    scorer: str
    """Name of the scorer that it was fitted for."""
    version: str
    """Version of that scorer without calibration; another one is refused."""
    captions: int
    """Number of rated captions that it was fitted on."""
    expected: tuple[float, ...]
    """Expected scores at the knots, strictly ascending."""
    rating: tuple[float, ...]
    """Mean ratings at the knots, ascending, in [1, 9]."""
    deviation: float
    """Root mean square error of the calibrated scores on those captions."""

    def __post_init__(self) -> None:
        x, y = np.array(self.expected, float), np.array(self.rating, float)
        if x.ndim != 1 or not len(x) or x.shape != y.shape or not np.isfinite([*x, *y, self.deviation]).all():
            raise UserError("a calibration needs as many ratings as expected scores, at least one of each")
        if (np.diff(x) <= 0).any() or (np.diff(y) < 0).any() or y[0] < 1 or y[-1] > 9 or self.deviation < 0:
            raise UserError("the knots of a calibration must ascend, with ratings from 1 to 9")

    @classmethod
    def fit(cls, scorer: Scorer, rated: Sequence[RatedCaption]) -> "ScoreCalibration":
        """Score rated captions with an uncalibrated scorer and fit the map by isotonic regression.

        Captions that cannot be scored are left out.

        Raises:
            UserError: fewer than `MIN_CAPTIONS` captions were scored.
        """
        from sklearn.isotonic import IsotonicRegression  # takes a second to import

        results = scorer.score_many([row.description for row in rated])
        pairs = [
            (result.expected, row.mean)
            for result, row in zip(results, rated, strict=True)
            if isinstance(result, Score)
        ]
        if len(pairs) < MIN_CAPTIONS:
            raise UserError(f"{len(pairs)} captions were scored; a calibration needs at least {MIN_CAPTIONS}")
        expected, means = np.array(sorted(pairs)).T
        groups = np.array_split(np.arange(len(pairs)), min(_MAX_KNOTS, max(len(pairs) // _GROUP, 1)))
        x = np.array([expected[group].mean() for group in groups])
        y = IsotonicRegression(y_min=1, y_max=9).fit_transform(x, [means[group].mean() for group in groups])
        x, first = np.unique(x, return_index=True)  # equal expected scores share their rating
        y = y[first]
        error = np.interp(expected, x, y) - means
        deviation = float(np.sqrt((error**2).mean()))
        return cls(scorer.name, scorer.version, len(pairs), tuple(x.tolist()), tuple(y.tolist()), deviation)

    @classmethod
    def load(cls, path: Path) -> "ScoreCalibration":
        """Load a calibration that `save` wrote.

        Raises:
            UserError: the file cannot be read or is not a calibration.
        """
        text = read_text(path)
        try:
            stored = parse_object(text)
            for name in ("expected", "rating"):
                stored[name] = tuple(map(float, stored[name]))
            return cls(**stored)
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{path}: not a calibration file ({error}); create one with `save`") from error

    def save(self, path: Path) -> None:
        """Save the calibration atomically as JSON."""
        with atomic_write(path) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def check(self, scorer: str, version: str) -> None:
        """Raise UserError if the calibration was fitted for another scorer, prompt or scale."""
        if (self.scorer, self.version) != (scorer, version):
            raise UserError(
                f"the calibration was fitted for {self.scorer} {self.version}, but the scorer is {scorer}"
                f" {version}; fit one for this model, prompt and scale"
            )

    def apply(self, expected: float) -> float:
        """Return the calibrated expected score."""
        return float(np.interp(expected, self.expected, self.rating))

    def confidence(self, calibrated: float) -> float:
        """Return the probability that a rating is within 0.5 of the rounded score, by a normal error."""
        score = round_score(calibrated)
        width = max(self.deviation, 1e-6) * math.sqrt(2)
        low, high = (math.erf((score + side - calibrated) / width) for side in (-0.5, 0.5))
        return min(max((high - low) / 2, 0.0), 1.0)

    @property
    def hash(self) -> str:
        """Hash of the map."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]
