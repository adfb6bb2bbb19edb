"""Fit of the fast scorer: networks, choice of their settings, and calibration.

Each network leaves out its own part of the captions. Settings are chosen and the calibration is fitted on
these parts alone, so that a fit needs no captions other than its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cat_fast.complexity.calibration import Boundaries
from cat_fast.complexity.description import Description
from cat_fast.complexity.distillation.fast_training import TrainingSettings, train_network, vocabulary_of
from cat_fast.complexity.distillation.word_vectors import WordVectors
from cat_fast.complexity.rated_captions import RatedCaption, assign_folds
from cat_fast.complexity.scorers.fast.scorer import SIGNALS, FastScorer, confidence_signals, squash

CANDIDATES = (TrainingSettings(word_dropout=0.3), TrainingSettings(word_dropout=0.15))
"""Settings to choose from, by the part that the first network leaves out."""
MEMBERS = 3
"""Number of networks."""
PARTS = 8
"""Each network leaves out one of so many parts, by image and text."""
_STATES: tuple[Callable[[Description], list[Description]], ...] = (
    lambda d: [d],
    lambda d: [Description(d.caption, None, d.has_faces), Description(d.caption, d.has_text, None)],
    lambda d: [Description(d.caption)],
)
"""Descriptions with both flags known, one, and none."""
_UNFITTED = Boundaries(4.5, 7.5)


def fit_fast(
    rated: Sequence[RatedCaption],
    pretrained: WordVectors,
    *,
    candidates: Sequence[TrainingSettings] = CANDIDATES,
    on_epoch: Callable[[], None] = lambda: None,
) -> FastScorer:
    """Fit a scorer to rated captions; those with one rating serve the training of the networks only."""
    parts = assign_parts(rated)
    double = np.array([len(row.ratings) > 1 for row in rated])
    vocabulary, own = vocabulary_of([row.description.caption for row in rated], pretrained)

    def train(member: int, settings: TrainingSettings) -> FastScorer:
        rows = [rated[i] for i in np.flatnonzero(parts != member).tolist()]
        network = train_network(rows, vocabulary, own, pretrained, settings, member, on_epoch)
        return FastScorer(vocabulary, (network,), (_UNFITTED,) * 3, np.zeros(SIGNALS))

    left_out = [[rated[i] for i in np.flatnonzero((parts == m) & double).tolist()] for m in range(MEMBERS)]
    trials = [train(0, settings) for settings in candidates]
    best = min(range(len(trials)), key=lambda i: mean_error(trials[i], left_out[0]))
    members = [trials[best], *(train(member, candidates[best]) for member in range(1, MEMBERS))]
    boundaries, confidence = calibrate(members, left_out)
    return replace(
        members[0],
        networks=tuple(network for member in members for network in member.networks),
        boundaries=boundaries,
        confidence=confidence,
    )


def assign_parts(rated: Sequence[RatedCaption]) -> np.ndarray:
    """Return the part of each caption of a fit, int64 (N,): member i of a scorer leaves out part i."""
    return assign_folds(rated, PARTS, seed=1)


def mean_error(scorer: FastScorer, rows: Sequence[RatedCaption]) -> float:
    """Return the mean absolute error before calibration, over captions with flags and without."""
    means = np.array([row.mean for row in rows])
    errors = []
    for state in (_STATES[0], _STATES[-1]):
        predictions, _, _ = scorer.predict([d for row in rows for d in state(row.description)])
        errors.append(float(np.abs(np.clip(predictions, 1, 9) - means).mean()))
    return float(np.mean(errors))


def calibrate(
    scorers: Sequence[FastScorer], left_out: Sequence[Sequence[RatedCaption]]
) -> tuple[tuple[Boundaries, Boundaries, Boundaries], np.ndarray]:
    """Return the boundaries per number of unknown flags, and the weights of the confidence.

    Args:
        scorers: scorers of one network each.
        left_out: captions that each of them was not fitted on.
    """
    boundaries, signals, right = [], [], []
    for state in _STATES:
        parts = []
        for scorer, rows in zip(scorers, left_out, strict=True):
            changed = [(d, row.mean) for row in rows for d in state(row.description)]
            means = np.array([mean for _, mean in changed])
            parts.append((*scorer.predict([d for d, _ in changed]), means))
        predictions, unknown_flags, unknown_words, means = map(np.concatenate, zip(*parts, strict=True))
        fitted = Boundaries.fit(predictions, means)
        expected = fitted.move(predictions)
        score = np.clip(np.floor(expected + 0.5), 1, 9)
        boundaries.append(fitted)
        signals.append(confidence_signals(expected, unknown_flags, unknown_words))
        right.append(np.abs(score - means) <= 0.5)
    both, one, none = boundaries
    return (both, one, none), fit_confidence(np.concatenate(signals), np.concatenate(right))


def fit_confidence(signals: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the weights (SIGNALS,) with which `squash` of the weighted sum is the likeliest probability."""
    from scipy.optimize import minimize

    def loss(weights: np.ndarray) -> float:
        share = np.clip(squash(signals @ weights), 1e-6, 1 - 1e-6)
        penalty = 1e-4 * float(weights @ weights)
        return penalty - float(np.where(right, np.log(share), np.log(1 - share)).mean())

    return np.asarray(minimize(loss, np.zeros(SIGNALS), method="L-BFGS-B").x)
