"""Quality of a distilled scorer out of fold: each caption is scored by a scorer fitted without its group.

Captions with one rating serve fits only. Each of the others is scored once per state of the flags, by the
scorer of its fold, through the interface that applications use.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cat_fast.complexity.description import Description
from cat_fast.complexity.distillation.paraphrases import PARAPHRASES
from cat_fast.complexity.distillation.quality import (
    Quality,
    largest_mix_difference,
    measure_quality,
    ratios_of,
    reliability,
    spearman,
)
from cat_fast.complexity.distillation.word_groups import WORD_GROUPS
from cat_fast.complexity.rated_captions import RatedCaption, assign_folds
from cat_fast.complexity.score import Scorer, require_scores, round_score
from cat_fast.data.files import atomic_write

FOLDS = 5
STATES = ("given", "inferred")
"""Flags given to the scorer, or inferred by it from the caption."""
PARAPHRASED = 200
"""Captions per fold that are paraphrased."""


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of the captions `rows` by the scorers of their folds."""

    rows: np.ndarray
    """Indices of the rated captions with two or more ratings, int64 (N,)."""
    expected: np.ndarray
    """Expected scores by state of the flags, float64 (2, N)."""
    confidence: np.ndarray
    """Confidences by state of the flags, float64 (2, N)."""
    paraphrased: np.ndarray
    """Indices of the paraphrased captions, int64 (M,)."""
    paraphrases: np.ndarray
    """Expected scores of their paraphrases with the flags given, float64 (len(PARAPHRASES), M)."""


def predict_out_of_fold(
    rated: Sequence[RatedCaption],
    fit: Callable[[np.ndarray], Scorer],
    folder: Path,
    *,
    settings: str,
) -> OutOfFold:
    """Fit a scorer per fold and score the captions of the fold.

    Args:
        rated: all rated captions.
        fit: returns a scorer fitted to the captions with the given indices, int64.
        folder: folder of finished folds, which are read instead of fitted again.
        settings: everything else that predictions depend on; folds of other settings are fitted again.
    """
    folds = assign_folds(rated, FOLDS)
    double = np.array([len(row.ratings) > 1 for row in rated])
    identity = hashlib.sha256(json.dumps([settings, [str(row) for row in rated]]).encode()).hexdigest()[:16]
    parts = []
    for fold in range(FOLDS):
        path = folder / f"fold{fold}-{identity}.npz"
        if not path.exists():
            scorer = fit(np.flatnonzero(folds != fold))
            part = _score(scorer, rated, np.flatnonzero((folds == fold) & double))
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **{f.name: getattr(part, f.name) for f in fields(part)})
        with np.load(path) as stored:
            parts.append(dict(stored))
    return OutOfFold(*(np.concatenate([p[f.name] for p in parts], -1) for f in fields(OutOfFold)))


def report(rated: Sequence[RatedCaption], found: OutOfFold) -> dict[str, Any]:
    """Return all figures as JSON values."""
    rows = [rated[i] for i in found.rows]
    means = np.array([row.mean for row in rows])
    sources = np.array([row.source for row in rows])
    domains = np.array([row.domain for row in rows])
    score = np.clip(np.floor(found.expected + 0.5), 1, 9)

    def qualities(chosen: np.ndarray) -> dict[str, Any]:
        figures = {
            state: measure_quality(found.expected[i][chosen], means[chosen]) for i, state in enumerate(STATES)
        }
        return {state: _quality_json(quality) for state, quality in figures.items()}

    by_source = {source: qualities(sources == source) for source in sorted(set(sources))}
    by_domain = {domain: qualities(domains == domain) for domain in sorted(set(domains) - {""})}
    return {
        "captions": len(rows),
        "folds": FOLDS,
        "all": qualities(np.ones(len(rows), dtype=bool)),
        "sources": by_source,
        "written_domains": by_domain,
        "word_groups": {
            name: qualities(members)
            for name, matches in WORD_GROUPS.items()
            if (members := np.array([matches(row.description.caption) for row in rows])).any()
        },
        "reliability": {
            state: _reliability_json(found.confidence[i], score[i], means) for i, state in enumerate(STATES)
        },
        "paraphrases": _paraphrases_json(rated, found),
        "raters": {
            name: _raters_json([row for row in rows if name in ("all", row.source)])
            for name in ("all", *by_source)
        },
    }


def _score(scorer: Scorer, rated: Sequence[RatedCaption], rows: np.ndarray) -> OutOfFold:
    given = [rated[i].description for i in rows]
    results = [
        require_scores(scorer, descriptions)
        for descriptions in (given, [Description(d.caption) for d in given])
    ]
    chosen = np.random.default_rng(0).permutation(len(rows))[:PARAPHRASED]
    paraphrases = [
        require_scores(
            scorer,
            [Description(change(d.caption), d.has_text, d.has_faces) for d in (given[i] for i in chosen)],
        )
        for change in PARAPHRASES.values()
    ]
    return OutOfFold(
        rows,
        np.array([[score.expected for score in scores] for scores in results]),
        np.array([[_known(score.confidence) for score in scores] for scores in results]),
        rows[chosen],
        np.array([[score.expected for score in scores] for scores in paraphrases]),
    )


def _known(confidence: float | None) -> float:
    return float("nan") if confidence is None else confidence


def _quality_json(quality: Quality) -> dict[str, Any]:
    figures = asdict(quality)
    for name in ("mix", "reference_mix"):
        figures[name] = {f"{ratio}x": share for ratio, share in figures[name].items()}
    return figures | {"mix_difference": largest_mix_difference([quality])}


def _reliability_json(confidence: np.ndarray, score: np.ndarray, means: np.ndarray) -> dict[str, Any]:
    bins, error = reliability(confidence, score, means)
    return {"bins": [asdict(b) for b in bins], "expected_calibration_error": error}


def _paraphrases_json(rated: Sequence[RatedCaption], found: OutOfFold) -> dict[str, Any]:
    """Compare the scores of paraphrased captions with those of the captions themselves."""
    position = {row: i for i, row in enumerate(found.rows.tolist())}
    original = found.expected[0][[position[row] for row in found.paraphrased.tolist()]]
    means = np.array([rated[i].mean for i in found.paraphrased])

    def ratios(expected: np.ndarray) -> np.ndarray:
        return ratios_of(np.array([round_score(value) for value in expected]))

    return {
        name: {
            "captions": len(original),
            "mean_change": float(np.abs(expected - original).mean()),
            "same_ratio": float((ratios(expected) == ratios(original)).mean()),
            "agreement": float((ratios(expected) == ratios_of(means)).mean()),
            "agreement_of_originals": float((ratios(original) == ratios_of(means)).mean()),
        }
        for name, expected in zip(PARAPHRASES, found.paraphrases, strict=True)
    }


def _raters_json(rows: Sequence[RatedCaption]) -> dict[str, float]:
    """Compare the first rater with the second."""
    first, second = (np.array([float(row.ratings[i]) for row in rows]) for i in (0, 1))
    return {
        "agreement": float((ratios_of(first) == ratios_of(second)).mean()),
        "spearman": spearman(first, second),
        "mae": float(np.abs(first - second).mean()),
        "within_half_a_point_of_the_mean": float((np.abs(first - second) <= 1).mean()),
    }
