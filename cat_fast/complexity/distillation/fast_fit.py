"""Fit of the fast scorer: choice of settings, calibration, and the network.

Settings and calibration come from captions held out of the given ones; the network is then trained on all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cat_fast.complexity.calibration import Boundaries
from cat_fast.complexity.description import Description
from cat_fast.complexity.distillation.fast_training import TrainingSettings, WordVectors, train_network
from cat_fast.complexity.distillation.rated_captions import RatedCaption, assign_folds
from cat_fast.complexity.scorers.fast.scorer import FastScorer, confidence_signals, squash

CANDIDATES = (TrainingSettings(epochs=16), TrainingSettings(epochs=28))
"""Settings to choose from."""
HELD_OUT = 5
"""One of this number of parts is held out, by image and text."""
_STATES: tuple[Callable[[Description], list[Description]], ...] = (
    lambda d: [d],
    lambda d: [Description(d.caption, None, d.has_faces), Description(d.caption, d.has_text, None)],
    lambda d: [Description(d.caption)],
)
"""Descriptions with both flags known, one, and none."""


@dataclass(frozen=True)
class Choice:
    """Settings and calibration, chosen on held-out captions."""

    settings: TrainingSettings
    boundaries: tuple[Boundaries, Boundaries, Boundaries]
    confidence: np.ndarray


def fit_fast(rated: Sequence[RatedCaption], pretrained: WordVectors, seed: int = 0) -> FastScorer:
    """Fit a scorer to rated captions; those with one rating serve the training of the network only."""
    choice = choose(rated, pretrained, seed)
    vocabulary, network = train_network(rated, pretrained, choice.settings, seed)
    return FastScorer(vocabulary, network, choice.boundaries, choice.confidence)


def choose(rated: Sequence[RatedCaption], pretrained: WordVectors, seed: int = 0) -> Choice:
    """Train on four fifths of the captions per candidate; choose and calibrate on the others.

    The candidate with the smallest mean absolute error with the flags given and unknown is chosen.
    """
    part = assign_folds(rated, HELD_OUT, seed=seed + 1)
    training = [row for row, fold in zip(rated, part, strict=True) if fold != 0]
    held_out = [
        row for row, fold in zip(rated, part, strict=True) if fold == 0 and len(row.ratings) > 1
    ]
    best: tuple[float, TrainingSettings, FastScorer] | None = None
    for settings in CANDIDATES:
        vocabulary, network = train_network(training, pretrained, settings, seed)
        scorer = FastScorer(vocabulary, network, (Boundaries(4.5, 7.5),) * 3, np.zeros(6))
        error = _error(scorer, held_out)
        if best is None or error < best[0]:
            best = error, settings, scorer
    assert best is not None
    _, settings, scorer = best
    return Choice(settings, *calibrate(scorer, held_out))


def calibrate(
    scorer: FastScorer, held_out: Sequence[RatedCaption]
) -> tuple[tuple[Boundaries, Boundaries, Boundaries], np.ndarray]:
    """Return the boundaries per number of unknown flags, and the weights of the confidence."""
    boundaries, signals, right = [], [], []
    for state in _STATES:
        rows = [(changed, row.mean) for row in held_out for changed in state(row.description)]
        means = np.array([mean for _, mean in rows])
        predictions, unknown_flags, unknown_words = scorer.predict([description for description, _ in rows])
        fitted = Boundaries.fit(predictions, means)
        expected = fitted.move(predictions)
        score = np.clip(np.floor(expected + 0.5), 1, 9)
        boundaries.append(fitted)
        signals.append(confidence_signals(expected, unknown_flags, unknown_words))
        right.append(np.abs(score - means) <= 0.5)
    both, one, none = boundaries
    return (both, one, none), fit_confidence(np.concatenate(signals), np.concatenate(right))


def fit_confidence(signals: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the weights (signals,) with which `squash` of the weighted sum is the likeliest probability."""
    from scipy.optimize import minimize

    def loss(weights: np.ndarray) -> float:
        share = np.clip(squash(signals @ weights), 1e-6, 1 - 1e-6)
        penalty = 1e-4 * float(weights @ weights)
        return penalty - float(np.where(right, np.log(share), np.log(1 - share)).mean())

    return np.asarray(minimize(loss, np.zeros(signals.shape[1]), method="L-BFGS-B").x)


def _error(scorer: FastScorer, rows: Sequence[RatedCaption]) -> float:
    means = np.array([row.mean for row in rows])
    errors = []
    for state in (_STATES[0], _STATES[-1]):
        predictions, _, _ = scorer.predict([d for row in rows for d in state(row.description)])
        errors.append(float(np.abs(np.clip(predictions, 1, 9) - means).mean()))
    return float(np.mean(errors))
