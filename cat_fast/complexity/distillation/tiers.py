"""Tiers of the distilled scorer, each with the function that fits it and the files that it is saved to."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from cat_fast.complexity.rated_captions import RatedCaption
from cat_fast.complexity.score import Scorer
from cat_fast.complexity.scorers.fast.scorer import FastScorer


class FittedScorer(Scorer, Protocol):
    """A scorer that can be saved."""

    def save(self, path: Path) -> None:
        """Save the scorer."""
        ...


class Tier(Protocol):
    """A kind of distilled scorer."""

    @property
    def name(self) -> str:
        """Name of the tier and of its files."""
        ...

    @property
    def settings(self) -> str:
        """Everything but the captions that a fit depends on, to recognize finished fits."""
        ...

    def prepare(
        self, rated: Sequence[RatedCaption], folder: Path, on_progress: Callable[[str, int, int], None]
    ) -> Callable[[np.ndarray], FittedScorer]:
        """Return the function that fits a scorer to the captions with the given indices, int64.

        Args:
            rated: all rated captions.
            folder: folder for the results of finished parts of fits, from which a fit resumes.
            on_progress: is called with the name of a part, the number of its finished steps and of all steps.
        """
        ...


class FastTier:
    """The fast tier."""

    name = "fast"

    @property
    def settings(self) -> str:
        """The settings of the fit and the encoder."""
        from cat_fast.complexity.distillation.fast_fit import CANDIDATES, MEMBERS, PARTS
        from cat_fast.complexity.sentence_encoder import FILES

        return f"{CANDIDATES} {MEMBERS} {PARTS} {sorted(FILES.items())}"

    def prepare(
        self, rated: Sequence[RatedCaption], folder: Path, on_progress: Callable[[str, int, int], None]
    ) -> Callable[[np.ndarray], FastScorer]:
        """Return the fitting function; the words are encoded at its first call."""
        from cat_fast.complexity.distillation.fast_fit import CANDIDATES, MEMBERS, fit_fast
        from cat_fast.complexity.distillation.word_vectors import WordVectors, word_vectors
        from cat_fast.complexity.sentence_encoder import SentenceEncoder

        pretrained: list[WordVectors] = []

        def fit(rows: np.ndarray) -> FastScorer:
            content = json.dumps([self.settings, rows.tolist(), [str(row) for row in rated]])
            path = folder / f"fast-{hashlib.sha256(content.encode()).hexdigest()[:16]}.npz"
            if path.exists():
                return FastScorer.load(path)
            if not pretrained:
                pretrained.append(
                    word_vectors(
                        SentenceEncoder.load(),
                        [row.description.caption for row in rated],
                        lambda done, total: on_progress("encoding words", done, total),
                    )
                )
            epochs, done = sum(c.epochs for c in CANDIDATES) + (MEMBERS - 1) * CANDIDATES[0].epochs, 0

            def epoch() -> None:
                nonlocal done
                done += 1
                on_progress("training networks", done, epochs)

            scorer = fit_fast([rated[i] for i in rows], pretrained[0], on_epoch=epoch)
            scorer.save(path)
            return scorer

        return fit


class AccurateTier:
    """The accurate tier."""

    name = "accurate"

    def __init__(self) -> None:
        from cat_fast.complexity.distillation.adapter_training import TrainingPlan

        self._plan, self._fast = TrainingPlan(), FastTier()

    @property
    def settings(self) -> str:
        """The training plan, the encoder and the settings of the fast tier."""
        from cat_fast.complexity.distillation.accurate_fit import MEMBERS

        return f"{self._plan} {MEMBERS} {self._fast.settings}"

    def prepare(
        self, rated: Sequence[RatedCaption], folder: Path, on_progress: Callable[[str, int, int], None]
    ) -> Callable[[np.ndarray], FittedScorer]:
        """Return the fitting function; the captions are encoded at its first call."""
        from cat_fast.complexity.distillation.accurate_fit import (
            EncodedCaptions,
            fit_accurate,
            training_steps,
        )
        from cat_fast.complexity.sentence_encoder import SentenceEncoder

        encoded: list[EncodedCaptions] = []
        fit_fast = self._fast.prepare(rated, folder, on_progress)

        def fit(rows: np.ndarray) -> FittedScorer:
            fast = fit_fast(rows)
            if not encoded:
                encoder = SentenceEncoder.load()
                encoded.append(
                    EncodedCaptions.compute(
                        encoder, rated, lambda done: on_progress("encoding captions", done, len(rated))
                    )
                )
            steps, done = training_steps(encoded[0], rows, self._plan), 0

            def step() -> None:
                nonlocal done
                done += 1
                on_progress("training an adapter", min(done, steps), steps)

            return fit_accurate(encoded[0], rows, fast, plan=self._plan, folder=folder, on_step=step)

        return fit


TIERS: dict[str, Callable[[], Tier]] = {"fast": FastTier, "accurate": AccurateTier}
"""Constructors of the tiers by name; the accurate one contains the fast one."""
