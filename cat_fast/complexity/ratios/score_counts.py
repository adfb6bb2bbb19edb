"""Numbers of images per complexity score, counted in batches and merged across shards."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cat_fast.data.images.label_fields import SCORES
from cat_fast.errors import UserError

_BUFFERED = 1 << 16
"""Number of scores to collect before they are sorted into the counts."""


class ScoreCounts:
    """Numbers of images per score, of integer or expected scores.

    Memory grows with the number of different scores: nine for integers, 16 bytes per image at most.

    Args:
        counts: number or share of images per score.

    Raises:
        UserError: a score is not in [1, 9], or a count is negative or not finite.
    """

    def __init__(self, counts: Mapping[float, float] | None = None) -> None:
        self._scores, self._counts = np.zeros(0), np.zeros(0)
        self._pending: list[np.ndarray] = []
        self._size = 0
        if counts:
            weights = np.asarray([float(count) for count in counts.values()])
            if not np.isfinite(weights).all() or weights.min() < 0:
                raise UserError(f"counts of scores must be finite and not negative, got {dict(counts)}")
            self._insert(_valid_scores(list(counts)), weights)

    @classmethod
    def of(cls, scores: "ScoreSource") -> "ScoreCounts":
        """Return the counts of scores in any supported form: counts, a mapping or an iterable of scores.

        Raises:
            UserError: there are no scores, or a score is not in [1, 9].
        """
        if not isinstance(scores, ScoreCounts):
            found = cls(scores if isinstance(scores, Mapping) else None)
            if not isinstance(scores, Mapping):
                found.add(scores)
            scores = found
        if not scores.total > 0:
            raise UserError("thresholds are fitted to the scores of at least one image, got no images")
        return scores

    def add(self, scores: Iterable[float]) -> None:
        """Count a batch of scores; raise UserError if one is not in [1, 9], and count none of them."""
        batch = _valid_scores(scores)
        self._pending.append(batch)
        self._size += len(batch)
        if self._size > max(_BUFFERED, len(self._scores)):
            self._sort()

    def merge(self, other: "ScoreCounts") -> None:
        """Add the counts of another set of images."""
        self._sort()
        self._insert(*other.sorted())

    @property
    def total(self) -> float:
        """Number of images."""
        return float(self.sorted()[1].sum())

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the different scores in ascending order and their counts, both float64 (N,)."""
        self._sort()
        return self._scores, self._counts

    def to_dict(self) -> dict[float, float]:
        """Return the counts per score in ascending order, for the constructor."""
        scores, counts = self.sorted()
        return dict(zip(scores.tolist(), counts.tolist(), strict=True))

    def _sort(self) -> None:
        pending, self._pending, self._size = self._pending, [], 0
        if pending:
            batch = np.concatenate(pending)
            self._insert(batch, np.ones(len(batch)))

    def _insert(self, scores: np.ndarray, counts: np.ndarray) -> None:
        every = np.concatenate([self._scores, scores])
        self._scores, index = np.unique(every, return_inverse=True)
        self._counts = np.bincount(
            index, np.concatenate([self._counts, counts]), minlength=len(self._scores)
        ).astype(np.float64)
        kept = self._counts > 0
        self._scores, self._counts = self._scores[kept], self._counts[kept]


ScoreSource = ScoreCounts | Mapping[float, float] | Iterable[float]
"""Scores of images: counts, a mapping from score to number or share of images, or one score per image."""


def _valid_scores(scores: Any) -> np.ndarray:
    """Return scores as float64 (N,)."""
    try:
        values = np.asarray(scores if isinstance(scores, np.ndarray) else list(scores))
        if values.size and values.dtype.kind not in "iuf":
            raise ValueError
        values = values.astype(np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise UserError(f"complexity scores must be numbers from 1 to 9, got {_shorten(scores)}") from None
    valid = (values >= SCORES[0]) & (values <= SCORES[-1])
    if not valid.all():
        raise UserError(f"a complexity score must be from 1 to 9, got {values[np.argmin(valid)]:g}")
    return values


def _shorten(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 1] + "…"
