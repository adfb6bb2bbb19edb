"""Results of the study: f*, correlations, agreement, mixes and robustness, as JSON values."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cat_fast.complexity import JPEG_THRESHOLDS, RATIOS, RatioThresholds, ScoreCounts, average_latent_side
from cat_fast.complexity.ratios.mix import average_ratio, mean_tokens
from cat_fast.errors import UserError
from cat_fast.evaluation.complexity_study.best_ratio import (
    PUBLISHED_TAU,
    TAUS,
    best_ratios,
    share_losing_less,
)
from cat_fast.evaluation.complexity_study.measure import Measurement
from cat_fast.evaluation.complexity_study.scores import ScoreSet
from cat_fast.evaluation.complexity_study.statistics import (
    Estimate,
    agreement,
    difference,
    estimate,
    pearson,
    spearman,
)

MIN_IMAGES = 10
JPEG, CAPTION_LENGTH = "JPEG bytes", "caption length"
PUBLISHED = {
    JPEG: 0.31,
    "reconstruction MSE": 0.36,
    "reconstruction LPIPS": 0.23,
    CAPTION_LENGTH: 0.33,
}
"""Pearson correlations with f*(0.0015) on COCO, as published (Table 9)."""
_PUBLISHED_SCORE = 0.55
"""That of scores of descriptions."""
_PUBLISHED_SCORERS = {
    "jpeg": PUBLISHED[JPEG],
    "caption-length": PUBLISHED[CAPTION_LENGTH],
    "image_student": None,
}
"""Those of scorers that read no descriptions, or only count words, by the first word of their name."""


@dataclass(frozen=True)
class Metric:
    """A measure of complexity."""

    name: str
    values: np.ndarray
    """Higher for more complex images, (N,)."""
    ratios: np.ndarray | None = None
    """Ratios by its own thresholds, (N,); None if it has none."""
    thresholds: tuple[float, float] | None = None
    published: float | None = None
    """Its published Pearson correlation with f*."""


@dataclass(frozen=True)
class Sample:
    """Images that all metrics have values for."""

    keys: list[str]
    ratios: np.ndarray
    """Ratios of the models, ascending, (R,)."""
    errors: np.ndarray
    """MSE per image and ratio, (N, R)."""
    distances: np.ndarray
    """Perceptual distance per image and ratio, (N, R)."""
    metrics: list[Metric]
    """The first one is the score under study."""
    left_out: dict[str, int]
    """Number of images without a measurement or a score, per reason."""

    def best(self, tau: float = PUBLISHED_TAU) -> np.ndarray:
        """Return f*(tau) per image, (N,)."""
        return best_ratios(self.errors, self.ratios, tau)


def collect(
    measurements: Sequence[Measurement], score_sets: Sequence[ScoreSet], thresholds: RatioThresholds
) -> Sample:
    """Return the images with measurements and scores of all sets.

    Raises:
        UserError: there are fewer than `MIN_IMAGES`.
    """
    readable = [row for row in measurements if row["error"] is None]
    scored = [scores.find([row["key"] for row in readable]) for scores in score_sets]
    used = [i for i in range(len(readable)) if all(found[i] is not None for found in scored)]
    left_out = {"unreadable": len(measurements) - len(readable), "without a score": len(readable) - len(used)}
    if len(used) < MIN_IMAGES:
        raise UserError(
            f"{len(used)} images have measurements and scores, expected at least {MIN_IMAGES}"
            f" ({left_out['unreadable']} unreadable, {left_out['without a score']} without a score); the keys"
            " of --scores must be those of --images, or have the same file names"
        )
    rows = [readable[i] for i in used]
    ratios = np.array(sorted(int(ratio) for ratio in rows[0]["mse"] or ()))
    metrics = [
        _of_scores(scores, [row for i in used if (row := found[i]) is not None], thresholds)
        for scores, found in zip(score_sets, scored, strict=True)
    ]
    sizes = np.array([row["jpeg_bytes"] for row in rows], dtype=np.float64)
    by_size = np.array([JPEG_THRESHOLDS.ratio(int(size)) for size in sizes])
    metrics.append(
        Metric(JPEG, sizes, by_size, (JPEG_THRESHOLDS.a, JPEG_THRESHOLDS.b), published=PUBLISHED[JPEG])
    )
    for name, field in (("reconstruction MSE", "signal_mse"), ("reconstruction LPIPS", "signal_lpips")):
        metrics.append(Metric(name, _column(rows, field), published=PUBLISHED[name]))
    captions = _captions([scores.find([row["key"] for row in rows]) for scores in score_sets])
    if captions is not None:
        lengths = np.array([len(caption.split()) for caption in captions], dtype=np.float64)
        metrics.append(Metric(CAPTION_LENGTH, lengths, published=PUBLISHED[CAPTION_LENGTH]))
    return Sample(
        [row["key"] for row in rows],
        ratios,
        _matrix(rows, "mse", ratios),
        _matrix(rows, "lpips", ratios),
        metrics,
        left_out,
    )


def summarize(sample: Sample) -> dict[str, Any]:
    """Return all results of the study as JSON values."""
    best, first = sample.best(), sample.metrics[0]
    return {
        "images": len(sample.keys),
        "left_out": sample.left_out,
        "ratios": sample.ratios.tolist(),
        "mse": _means(sample.errors, sample.ratios),
        "lpips": _means(sample.distances, sample.ratios),
        "share_losing_less_than_0.001_at_the_largest_ratio": share_losing_less(sample.errors, 0.001),
        "tau": PUBLISHED_TAU,
        "best_ratio": {str(tau): _mix(sample.best(tau), sample.ratios) for tau in TAUS},
        "metrics": {metric.name: _metric(metric, sample) for metric in sample.metrics},
        "differences": {
            metric.name: {
                "pearson": asdict(_difference(pearson, first, metric, best)),
                "spearman": asdict(_difference(spearman, first, metric, best)),
            }
            for metric in sample.metrics[1:]
        },
        "robustness": _robustness([metric for metric in sample.metrics if _is_score(metric)]),
        "fitted_thresholds": _fitted_thresholds(first),
        "jpeg_bytes": _jpeg(next(m for m in sample.metrics if m.name == JPEG).values),
        "verdict": verdict(sample),
    }


def verdict(sample: Sample) -> str:
    """Return one sentence that compares the score with JPEG size, in whichever direction the data decide."""
    best, score = sample.best(), sample.metrics[0]
    jpeg = next(metric for metric in sample.metrics if metric.name == JPEG)
    r, other = (float(pearson(metric.values, _target(best))) for metric in (score, jpeg))
    paired = _difference(pearson, score, jpeg, best)
    interval = f"difference {paired.value:+.2f}, 95 % interval {paired.low:+.2f} to {paired.high:+.2f}"
    values = f"Pearson {r:.2f} for {score.name}, {other:.2f} for JPEG bytes; {interval}"
    if paired.low > 0:
        return f"The score predicts the best ratio better than JPEG size on these images ({values})."
    if paired.high < 0:
        return f"JPEG size predicts the best ratio better than the score on these images ({values})."
    return f"The score and JPEG size do not differ significantly on these images ({values})."


def fitted_ratios(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return ratios by thresholds on `values` that are fitted to the mix of the ratios `like`, (N,)."""
    ratios = np.empty_like(like)
    ratios[np.argsort(values, kind="stable")] = np.sort(like)[::-1]
    return ratios


def disagreements(sample: Sample, count: int) -> list[tuple[str, list[int]]]:
    """Return the images on which the score and each other metric disagree most, by the difference of ranks.

    Returns:
        Per pair and direction, a description and the indices of images.
    """
    score, found = sample.metrics[0], []
    ranks = {metric.name: _ranks(metric.values) for metric in sample.metrics}
    for other in sample.metrics[1:]:
        gap = ranks[score.name] - ranks[other.name]
        order = np.argsort(gap)
        found.append((f"{score.name} high, {other.name} low", order[::-1][:count].tolist()))
        found.append((f"{score.name} low, {other.name} high", order[:count].tolist()))
    return found


def _of_scores(scores: ScoreSet, rows: Sequence[Any], thresholds: RatioThresholds) -> Metric:
    ratios = np.array([thresholds.ratio_of(row) for row in rows])
    expected = np.array([row.expected for row in rows])
    published = _PUBLISHED_SCORERS.get(re.split("[ :]", scores.scorer)[0], _PUBLISHED_SCORE)
    return Metric(scores.name, expected, ratios, thresholds.pair, published)


def _is_score(metric: Metric) -> bool:
    return metric.ratios is not None and metric.name != JPEG


def _captions(sets: Sequence[Sequence[Any]]) -> list[str] | None:
    """Return the captions of the first set that has one for each image."""
    for rows in sets:
        captions = [row.caption for row in rows]
        if all(captions):
            return captions
    return None


def _column(rows: Sequence[Measurement], field: str) -> np.ndarray:
    values: Sequence[Mapping[str, Any]] = rows
    return np.array([row[field] for row in values], dtype=np.float64)


def _matrix(rows: Sequence[Measurement], field: str, ratios: np.ndarray) -> np.ndarray:
    values: Sequence[Mapping[str, Any]] = rows
    return np.array([[row[field][str(f)] for f in ratios] for row in values])


def _target(best: np.ndarray) -> np.ndarray:
    """Return the negated f*, with which a good metric of complexity correlates positively."""
    return -best.astype(np.float64)


def _difference(statistic: Any, first: Metric, second: Metric, best: np.ndarray) -> Estimate:
    return difference(statistic, first.values, second.values, _target(best))


def _metric(metric: Metric, sample: Sample) -> dict[str, Any]:
    best = sample.best()
    chosen = fitted_ratios(metric.values, best)
    found: dict[str, Any] = {
        "published": metric.published,
        "pearson": asdict(estimate(pearson, metric.values, _target(best))),
        "spearman": asdict(estimate(spearman, metric.values, _target(best))),
        "pearson_at": {str(tau): float(pearson(metric.values, _target(sample.best(tau)))) for tau in TAUS},
        "agreement_fitted": asdict(estimate(agreement, chosen, best)),
    }
    if metric.ratios is not None:
        found |= {
            "thresholds": metric.thresholds,
            "agreement": asdict(estimate(agreement, metric.ratios, best)),
            "mix": _mix(metric.ratios, np.array(RATIOS)),
            "cost": _cost(metric.ratios),
        }
    return found


def _robustness(scores: Sequence[Metric]) -> dict[str, Any]:
    """Return the mix of each scorer, and agreement and rank correlation of each pair (Table 10)."""
    pairs = [
        {
            "scorers": [first.name, second.name],
            "agreement": float(np.mean(first.ratios == second.ratios)),
            "spearman": float(spearman(first.values, second.values)),
        }
        for i, first in enumerate(scores)
        for second in scores[i + 1 :]
    ]
    mixes = {
        metric.name: {"mix": _mix(metric.ratios, np.array(RATIOS)), **_cost(metric.ratios)}
        for metric in scores
        if metric.ratios is not None
    }
    return {"scorers": mixes, "pairs": pairs}


def _fitted_thresholds(score: Metric) -> list[dict[str, Any]]:
    """Return the integer thresholds under which images cost as much as with a fixed 16x tokenizer."""
    integers = np.clip(np.floor(score.values + 0.5), 1, 9).astype(int)
    counts = ScoreCounts.of(integers.tolist())
    return [
        {"thresholds": list(c.thresholds.pair), "mean_tokens": c.mean_tokens}
        for c in RatioThresholds.candidates(counts)[:5]
    ]


def _means(values: np.ndarray, ratios: np.ndarray) -> dict[str, float]:
    return {str(ratio): float(column.mean()) for ratio, column in zip(ratios, values.T, strict=True)}


def _jpeg(sizes: np.ndarray) -> dict[str, float]:
    return {
        "min": float(sizes.min()),
        "max": float(sizes.max()),
        "mean": float(sizes.mean()),
        "sd": float(sizes.std()),
    }


def _mix(ratios: np.ndarray | None, of: np.ndarray) -> dict[str, float]:
    return {str(f): float(np.mean(ratios == f)) for f in of}


def _cost(ratios: np.ndarray | None) -> dict[str, float]:
    mix = {f: float(np.mean(ratios == f)) for f in RATIOS}
    return {
        "latent_side": average_latent_side(mix),
        "average_ratio": average_ratio(mix),
        "mean_tokens": mean_tokens(mix),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.linspace(0, 1, len(values))
    return ranks
