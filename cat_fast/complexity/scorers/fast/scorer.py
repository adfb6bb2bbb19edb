"""The fast scorer, packaged with the library: deterministic, without torch and without downloads.

See `cat_fast.complexity.distillation.fast_fit` for the fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from cat_fast.complexity.array_file import read_arrays, save_arrays, version_of
from cat_fast.complexity.calibration import Boundaries
from cat_fast.complexity.contributions import contributions
from cat_fast.complexity.description import Description
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.complexity.scorers.fast.network import Network
from cat_fast.complexity.scorers.fast.words import UNKNOWN, Vocabulary

FAST_FILE = Path(__file__).parents[2] / "assets" / "fast_scorer.npz"
"""The packaged scorer."""
_BATCH = 512
"""Captions per call of the network, which bounds the memory."""
_DECIMALS = 4
"""Decimals of expected scores and confidences."""
SIGNALS = 6
"""Number of signals that the confidence depends on."""


@dataclass(frozen=True)
class FastScorer:
    """A small network over word vectors, pairs of words and the flags, in exact arithmetic, calibrated.

    Scores depend on the description alone: not on the other descriptions of a call, the process or the
    processor.
    """

    vocabulary: Vocabulary
    networks: tuple[Network, ...]
    """Networks whose predictions are averaged."""
    boundaries: tuple[Boundaries, Boundaries, Boundaries]
    """With both flags known, one, and none."""
    confidence: np.ndarray
    """Weights of `confidence_signals`, float64 (SIGNALS,)."""

    name: ClassVar[str] = "fast"

    @classmethod
    def load(cls, path: Path | None = None) -> "FastScorer":
        """Load the scorer at `path`, by default the packaged one.

        Raises:
            UserError: the file is missing or does not contain a scorer.
        """
        return read_arrays(FAST_FILE if path is None else path, "fast scorer", _parse)

    def save(self, path: Path) -> None:
        """Save the scorer atomically as plain arrays (npz, no pickle)."""
        save_arrays(path, self._arrays())

    @cached_property
    def version(self) -> str:
        """Hash of the scorer's arrays; scorers with the same version give the same scores."""
        return version_of(self._arrays())

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        """Score each description, in order."""
        scores: list[Score | ScoringFailure] = []
        for first in range(0, len(descriptions), _BATCH):
            expected, confidence = self._score(descriptions[first : first + _BATCH])
            pairs = zip(expected.tolist(), confidence.tolist(), strict=True)
            scores += [Score.of_expected(value, sure) for value, sure in pairs]
        return scores

    def predict(self, descriptions: Sequence[Description]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return predictions before calibration, and what calibration depends on besides.

        Returns:
            Predictions, float64 (N,); number of unknown flags, int64 (N,); share of words outside the
            vocabulary, float64 (N,).
        """
        flags = np.array([[_SIGN[d.has_text], _SIGN[d.has_faces]] for d in descriptions]).reshape(-1, 2)
        text = self.vocabulary.flatten([d.caption for d in descriptions])
        unknown = np.add.reduceat((text.words == UNKNOWN).astype(np.int64), text.starts)
        share = unknown / np.maximum(text.lengths, 1)
        predictions = np.mean([network.predict(text, flags) for network in self.networks], axis=0)
        return predictions, (flags == 0).sum(1), share

    def contributions(self, description: Description) -> list[tuple[str, float]]:
        """Return the effects of words and flags, largest magnitude first; see `contributions`."""
        return contributions(self, description)

    def _score(self, descriptions: Sequence[Description]) -> tuple[np.ndarray, np.ndarray]:
        predictions, unknown_flags, unknown_words = self.predict(descriptions)
        moved = [boundaries.move(predictions) for boundaries in self.boundaries]
        expected = np.round(np.choose(unknown_flags, moved), _DECIMALS)
        signals = confidence_signals(expected, unknown_flags, unknown_words)
        odds = np.add.reduce(signals * self.confidence, axis=1)
        return expected, np.round(squash(odds), _DECIMALS)

    def _arrays(self) -> dict[str, np.ndarray]:
        networks = {
            f"network{i}/{name}": getattr(network, name)
            for i, network in enumerate(self.networks)
            for name in Network.names()
        }
        return networks | {
            "words": np.frombuffer("\n".join(self.vocabulary.words).encode(), np.uint8),
            "pairs": self.vocabulary.pairs,
            "boundaries": np.array([(b.low, b.high) for b in self.boundaries]),
            "confidence": self.confidence,
        }


@cache
def fast_scorer() -> FastScorer:
    """Return the packaged scorer, loaded once."""
    return FastScorer.load()


def confidence_signals(
    expected: np.ndarray, unknown_flags: np.ndarray, unknown_words: np.ndarray
) -> np.ndarray:
    """Return what the confidence depends on, float64 (N, SIGNALS)."""
    score = np.clip(np.floor(expected + 0.5), 1, 9)
    middle = expected / 5 - 1
    signals = [
        np.ones(len(expected)),
        np.abs(expected - score),
        middle,
        middle**2,
        unknown_flags,
        unknown_words,
    ]
    return np.stack(signals, axis=1).astype(np.float64)


def squash(odds: np.ndarray) -> np.ndarray:
    """Map real numbers to (0, 1) without functions that differ between processors."""
    return 0.5 + 0.5 * odds / np.sqrt(1 + odds * odds)


_SIGN = {None: 0.0, True: 1.0, False: -1.0}


def _parse(arrays: Mapping[str, np.ndarray]) -> FastScorer:
    vocabulary = Vocabulary(tuple(arrays["words"].tobytes().decode().split("\n")), arrays["pairs"])
    count = len({name.partition("/")[0] for name in arrays if name.startswith("network")})
    networks = tuple(
        Network(**{name: arrays[f"network{i}/{name}"] for name in Network.names()}) for i in range(count)
    )
    if not networks:
        raise KeyError("network0")
    for network in networks:
        if len(network.vectors) != vocabulary.size or len(network.pair_terms) != len(vocabulary.pairs) + 1:
            raise ValueError("the networks do not fit the vocabulary")
    both, one, none = (Boundaries(*map(float, row)) for row in arrays["boundaries"])
    confidence = arrays["confidence"]
    if confidence.shape != (SIGNALS,):
        raise ValueError(f"confidence: expected shape {(SIGNALS,)}, got {confidence.shape}")
    return FastScorer(vocabulary, networks, (both, one, none), confidence)
