"""Trials of image students out of fold, against JPEG sizes with thresholds fitted in the same folds."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cat_fast.complexity.distillation.images.heads import PENALTIES, KernelHead, Term
from cat_fast.complexity.distillation.images.image_data import ImageData
from cat_fast.complexity.distillation.images.small_cnn import predict_by_cnn
from cat_fast.complexity.distillation.quality import (
    INTERVAL,
    RESAMPLES,
    Estimate,
    mix_of,
    ratios_of,
    spearman,
)

FOLDS = 5
JPEG = "JPEG bytes"
EXTRA_WEIGHT = 0.1
HEADS: Mapping[str, KernelHead] = {
    "linear head, AlexNet": KernelHead([Term("trunk", "linear")]),
    "kernel head, AlexNet": KernelHead([Term("trunk", "rbf")]),
    "linear head, low-level features": KernelHead([Term("low", "linear")]),
    "kernel head, low-level features": KernelHead([Term("low", "rbf")]),
    "linear heads, both": KernelHead([Term("trunk", "linear"), Term("low", "linear")]),
    "kernel heads, both": KernelHead([Term("trunk", "rbf"), Term("low", "rbf")]),
    "linear head, AlexNet, and kernel head, low-level features": KernelHead(
        [Term("trunk", "linear"), Term("low", "rbf")]
    ),
    "the same, with further images": KernelHead([Term("trunk", "linear"), Term("low", "rbf")], EXTRA_WEIGHT),
}
"""Heads on frozen features, by name."""
CNN, CNN_EXTRA = "small CNN", "small CNN, with further images"
CANDIDATES = ("linear head, AlexNet, and kernel head, low-level features", "the same, with further images")
"""Heads that `ImageStudent` can have."""


@dataclass(frozen=True)
class Trial:
    """Predictions of the rated images, each by a model that was fitted without its fold."""

    predictions: np.ndarray
    """(N,)."""
    ratios: np.ndarray
    """By thresholds fitted in the other folds to the raters' mix, (N,)."""
    penalty: float | None = None
    """Ridge penalty that most folds chose."""
    further: float | None = None
    """Rank correlation with the teacher's scores of further images, each predicted without its fold."""


def assign_image_folds(count: int, seed: int = 0) -> np.ndarray:
    """Return the fold of each rated image, int64 (N,); every image is a file of its own."""
    folds = np.empty(count, dtype=np.int64)
    folds[np.random.default_rng(seed).permutation(count)] = np.arange(count) % FOLDS
    return folds


def run_trials(
    data: ImageData, on_done: Callable[[str], None] = lambda name: None, cnn: bool = True
) -> dict[str, Trial]:
    """Return the trial of JPEG sizes, and of all models.

    Args:
        data: rated images, and further ones that only serve fits.
        on_done: called with the name of each trial.
        cnn: also train the small networks.
    """
    found = {JPEG: _jpeg(data)}
    for name, head in HEADS.items():
        if head.extra_weight and data.rated.all():
            continue
        found[name] = _of_head(data, head)
        on_done(name)
    if cnn:
        found[CNN] = _of_cnn(data, extra=False)
        on_done(CNN)
        if not data.rated.all():
            found[CNN_EXTRA] = _of_cnn(data, extra=True)
            on_done(CNN_EXTRA)
    return found


def table(trials: Mapping[str, Trial], means: np.ndarray) -> dict[str, Any]:
    """Return quality of each trial and its paired difference from JPEG sizes, as JSON values.

    Args:
        means: mean ratings, (N,).
    """
    baseline = trials[JPEG]
    return {
        name: {
            **{key: asdict(value) for key, value in _quality(trial, means).items()},
            "mix": {str(ratio): share for ratio, share in mix_of(trial.ratios).items()},
            "spearman_further": trial.further,
            "penalty": trial.penalty,
            **(
                {}
                if trial is baseline
                else {
                    "over_jpeg": {
                        key: asdict(value) for key, value in _differences(trial, baseline, means).items()
                    }
                }
            ),
        }
        for name, trial in trials.items()
    }


def passes(row: Mapping[str, Any]) -> bool:
    """Return whether a row of the table is above JPEG sizes in both measures, intervals above zero."""
    return all(row["over_jpeg"][key]["low"] > 0 for key in ("agreement", "spearman"))


def fit_cuts(values: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the cuts at which values have the mix of the ratios `reference`."""
    ordered = np.sort(values)
    padded = np.concatenate([[ordered[0] - 1], ordered, [ordered[-1] + 1]])
    counts = (int((reference == 32).sum()), int((reference != 8).sum()))
    low, high = (float((padded[n] + padded[n + 1]) / 2) for n in counts)
    return low, high


def apply_cuts(values: np.ndarray, cuts: tuple[float, float]) -> np.ndarray:
    """Return the ratios of values, (N,)."""
    return np.where(values <= cuts[0], 32, np.where(values <= cuts[1], 16, 8))


def _jpeg(data: ImageData) -> Trial:
    rated = np.flatnonzero(data.rated)
    sizes, reference = data.jpeg[rated].astype(np.float64), ratios_of(data.targets[rated])
    folds, ratios = assign_image_folds(len(rated)), np.zeros(len(rated), dtype=np.int64)
    for fold in range(FOLDS):
        others = folds != fold
        ratios[~others] = apply_cuts(sizes[~others], fit_cuts(sizes[others], reference[others]))
    further = ~data.rated
    return Trial(
        sizes, ratios, further=spearman(data.jpeg[further], data.targets[further]) if further.any() else None
    )


def _of_head(data: ImageData, head: KernelHead) -> Trial:
    rated, extra = np.flatnonzero(data.rated), np.flatnonzero(~data.rated)
    folds = assign_image_folds(len(rated))
    means = data.targets[rated]
    predictions, ratios = np.zeros(len(rated)), np.zeros(len(rated), dtype=np.int64)
    chosen = []
    for fold in range(FOLDS):
        others = np.flatnonzero(folds != fold)
        inner = np.zeros((len(PENALTIES), len(rated)))
        for held in range(FOLDS):
            if held != fold:
                asked = np.flatnonzero(folds == held)
                fitted = np.flatnonzero((folds != fold) & (folds != held))
                rows = head.rows(data, np.concatenate([rated[fitted], extra]))
                inner[:, asked] = head.predict(data, rows, rated[asked])
        best = int(np.argmin(np.square(inner[:, others] - means[others]).mean(1)))
        chosen.append(PENALTIES[best])
        asked = np.flatnonzero(folds == fold)
        rows = head.rows(data, np.concatenate([rated[others], extra]))
        predictions[asked] = head.predict(data, rows, rated[asked])[best]
        cuts = fit_cuts(inner[best, others], ratios_of(means[others]))
        ratios[asked] = apply_cuts(predictions[asked], cuts)
    penalty = max(set(chosen), key=chosen.count)
    return Trial(predictions, ratios, penalty, _on_further(data, head, penalty) if len(extra) else None)


def _on_further(data: ImageData, head: KernelHead, penalty: float) -> float:
    """Return the rank correlation on further images, fitted to rated images and the other folds."""
    rated, extra = np.flatnonzero(data.rated), np.flatnonzero(~data.rated)
    folds, predictions = assign_image_folds(len(extra)), np.zeros(len(extra))
    for fold in range(FOLDS):
        rows = head.rows(data, np.concatenate([rated, extra[folds != fold]]))
        found = head.predict(data, rows, extra[folds == fold])
        predictions[folds == fold] = found[PENALTIES.index(penalty)]
    return spearman(predictions, data.targets[extra])


def _of_cnn(data: ImageData, extra: bool) -> Trial:
    """Return the trial of the small network, whose cuts are those of the other folds' predictions.

    A network per pair of folds would take five times as long. The prediction of an image never comes from a
    network that was trained on it, but cuts of a fold come from networks that were trained on it.
    """
    rated, further = np.flatnonzero(data.rated), np.flatnonzero(~data.rated)
    folds, means = assign_image_folds(len(rated)), data.targets[rated]
    predictions, ratios = np.zeros(len(rated)), np.zeros(len(rated), dtype=np.int64)
    for fold in range(FOLDS):
        asked, rows = rated[folds == fold], rated[folds != fold]
        rows = np.concatenate([rows, further]) if extra else rows
        predictions[folds == fold] = predict_by_cnn(data, rows, asked)
    for fold in range(FOLDS):
        others = folds != fold
        cuts = fit_cuts(predictions[others], ratios_of(means[others]))
        ratios[~others] = apply_cuts(predictions[~others], cuts)
    return Trial(predictions, ratios)


def _figures(trial: Trial, means: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    agreement = float((trial.ratios[rows] == ratios_of(means[rows])).mean())
    return agreement, spearman(trial.predictions[rows], means[rows])


def _quality(trial: Trial, means: np.ndarray) -> dict[str, Estimate]:
    samples = np.array([_figures(trial, means, rows) for rows in _resamples(len(means))])
    return _estimates(_figures(trial, means, np.arange(len(means))), samples)


def _differences(trial: Trial, baseline: Trial, means: np.ndarray) -> dict[str, Estimate]:
    def gain(rows: np.ndarray) -> np.ndarray:
        return np.subtract(_figures(trial, means, rows), _figures(baseline, means, rows))

    samples = np.array([gain(rows) for rows in _resamples(len(means))])
    return _estimates(gain(np.arange(len(means))), samples)


def _resamples(count: int) -> list[np.ndarray]:
    """Return the same resampled images for every trial, which pairs their differences."""
    random = np.random.default_rng(0)
    return [random.integers(0, count, count) for _ in range(RESAMPLES)]


def _estimates(values: Any, samples: np.ndarray) -> dict[str, Estimate]:
    low, high = np.quantile(samples, INTERVAL, axis=0)
    rows = zip(("agreement", "spearman"), values, low, high, strict=True)
    return {name: Estimate(float(value), float(below), float(above)) for name, value, below, above in rows}
