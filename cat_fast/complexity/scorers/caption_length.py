"""Caption length as a score, the simplest baseline of the paper's Table 9."""

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np

from cat_fast.complexity.description import Description
from cat_fast.complexity.rated_captions import read_rated
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.errors import UserError

UNITS = ("words", "characters")
_KNOTS = 101


class CaptionLength:
    """Number of words or characters of a caption, mapped monotonically to 1..9.

    Quantiles of the packaged captions' lengths map to the same quantiles of their ratings, so that both have
    the same distribution there. Flags have no effect. Scripts without spaces need the unit "characters".
    """

    def __init__(self, unit: Literal["words", "characters"] = "words") -> None:
        """Fit the map on the packaged rated captions.

        Raises:
            UserError: there is no such unit.
        """
        if unit not in UNITS:
            raise UserError(f"the length of a caption is counted in words or characters, got {unit!r}")
        self.unit = unit
        self.name = f"caption-length:{unit}"
        self._lengths, self._scores = _fit(unit)
        knots = f"{self._lengths.tolist()} {self._scores.tolist()}"
        self.version = hashlib.sha256(knots.encode()).hexdigest()[:12]

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        """Score each description, in order."""
        lengths = [_length(description.caption, self.unit) for description in descriptions]
        return [Score.of_expected(x) for x in np.interp(lengths, self._lengths, self._scores).tolist()]


@cache
def _fit(unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths, strictly ascending, and the ratings that they map to, ascending."""
    rated = read_rated()
    shares = np.linspace(0, 1, _KNOTS)
    lengths = np.quantile([_length(row.description.caption, unit) for row in rated], shares)
    ratings = np.quantile([row.mean for row in rated], shares)
    knots, which = np.unique(lengths, return_inverse=True)  # equal lengths share their mean rating
    return knots, np.bincount(which, weights=ratings) / np.bincount(which)


def _length(caption: str, unit: str) -> int:
    return len(caption.split()) if unit == "words" else len(" ".join(caption.split()))
