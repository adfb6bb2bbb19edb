"""Figures of each column with their intervals, the per-image table, and the JSON result."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from cat_fast.data.files import atomic_write
from cat_fast.evaluation.distances.frechet import frechet_distance
from cat_fast.evaluation.distances.statistics import FeatureStatistics
from cat_fast.evaluation.intervals import Estimate, jackknife_over_images, mean_interval, ratio_interval
from cat_fast.evaluation.provenance import machine, versions
from cat_fast.evaluation.tokenizers import faces, text
from cat_fast.evaluation.tokenizers.columns import Column
from cat_fast.evaluation.tokenizers.protocol import FLOPS_UNIT
from cat_fast.evaluation.tokenizers.run import ReconstructionRun, Results, Row

PATCH = 2
"""Patch size of the DiT, for tokens."""
PUBLISHED_SIZE = 512


def summarize(
    run: ReconstructionRun,
    results: Results,
    tools: dict[str, str],
    seconds: float,
    on_column: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the result of a run as JSON values.

    Args:
        tools: versions of the OCR engine and the face detector.
        seconds: duration of the run so far.
        on_column: called after each column.
    """
    columns, timing = {}, {}
    for column in run.columns:
        rows = results.columns[column.name]
        columns[column.name] = _column(run, results, column, rows)
        timing[column.name] = float(np.mean([row.values["seconds"] for row in rows]))
        on_column()
    samples = run.samples
    return {
        "evaluation": "reconstruction",
        "data": {
            "path": samples.data,
            "split": samples.split,
            "images": len(results.keys),
            "fingerprint": samples.fingerprint(),
            "size": run.settings.size,
            "crop": "largest centre square, one antialiased bicubic pass (Pillow)",
            "rounding": "reconstructions are rounded to the nearest of 256 levels before every metric",
            "skipped": [entry._asdict() for entry in results.skipped],
        },
        "columns": columns,
        "tokenizers": {name: tokenizer.record() for name, tokenizer in run.tokenizers.items()},
        "networks": {"rfid": run.network.record(), "perceptual": run.perceptual.record, **tools},
        "deviations": deviations(run, len(results.keys)),
        "intervals": (
            "95 %: percentile bootstrap over images, 1,000 resamples; rFID: jackknife over 10 groups"
        ),
        "versions": versions(),
        "timing": {"seconds": round(seconds, 2), "tokenizer_seconds_per_image": timing, **machine()},
    }


def deviations(run: ReconstructionRun, images: int) -> list[str]:
    """Return the differences from the published protocol, which make figures incomparable."""
    found, features = [], run.network.network.sizes["pool"]
    if run.network.prefix or run.network.suffix:
        found.append("features for rFID of an offline trunk or of other weights")
    if images <= features:
        found.append(
            f"{images} images for {features} features: the covariance is singular, and rFID depends on the"
            " number of images more than on their quality"
        )
    if run.settings.size != PUBLISHED_SIZE:
        found.append(f"images of {run.settings.size} px instead of {PUBLISHED_SIZE}")
    if run.samples.split != "validation":
        found.append(f"{run.samples.split} split instead of validation")
    return found


def write_images(path: Path, run: ReconstructionRun, results: Results) -> None:
    """Write one row per image and column."""
    labels = {scored.key: scored for scored in run.samples.scored}
    table = []
    for column in run.columns:
        for original, row in zip(results.originals, results.columns[column.name], strict=True):
            table.append(
                {
                    "key": row.key,
                    "column": column.name,
                    "tokenizer": row.rendition.tokenizer,
                    "choice": row.rendition.choice,
                    "positions": column.tokenizer.positions(row.rendition.choice, run.settings.size),
                    "score": labels[row.key].score,
                    "expected": labels[row.key].expected,
                    "psnr": row.values["psnr"],
                    "ssim": row.values["ssim"],
                    run.perceptual.name: row.values["perceptual"],
                    **_text_values(original, row),
                    **_face_values(original, row),
                    "seconds": row.values["seconds"],
                }
            )
    with atomic_write(path) as part:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), part)


def rfid(originals: Sequence[Row], rows: Sequence[Row]) -> Estimate:
    """Return rFID of rows against their originals, with its interval where there are enough images."""
    first, second = (
        torch.from_numpy(np.stack([row.features for row in side if row.features is not None]))
        for side in (originals, rows)
    )

    def compute(numbers: np.ndarray) -> float:
        gaussians = []
        for features in (first, second):
            statistics = FeatureStatistics(features.shape[1])
            statistics.update(features[torch.from_numpy(numbers)])
            gaussians.append(statistics.gaussian())
        return frechet_distance(*gaussians)

    found = jackknife_over_images(len(first), compute)
    if found is not None:
        return found
    value = compute(np.arange(len(first))) if len(first) > 1 else math.nan
    return Estimate(value, math.nan, math.nan)


def _column(run: ReconstructionRun, results: Results, column: Column, rows: Sequence[Row]) -> dict[str, Any]:
    size, seed, tokenizer = run.settings.size, run.settings.seed, column.tokenizer
    choices = Counter(row.rendition.choice for row in rows)
    each = [tokenizer.positions(row.rendition.choice, size) for row in rows]
    positions = sum(each) / len(rows)
    per_token = PATCH**2 if tokenizer.is_spatial else 1
    flops = {choice: tokenizer.flops(choice, size) for choice in choices}
    metrics: dict[str, Any] = {
        f"{run.network.prefix}rFID{run.network.suffix}": _as_json(rfid(results.originals, rows)),
        run.perceptual.name: _as_json(mean_interval([row.values["perceptual"] for row in rows], seed)),
        "PSNR": _as_json(mean_interval([row.values["psnr"] for row in rows], seed)),
        "SSIM": _as_json(mean_interval([row.values["ssim"] for row in rows], seed)),
    }
    if run.settings.ocr:
        metrics |= _text(results.originals, rows, size, seed)
    if run.settings.faces:
        metrics |= _faces(results.originals, rows, size, seed)
    found: dict[str, Any] = {
        "tokenizer": tokenizer.name,
        "rule": column.rule,
        "metrics": metrics,
        "distribution": {str(choice): n / len(rows) for choice, n in sorted(choices.items())},
        "positions": positions,
        "tokens": positions / per_token,
        "tokens_interval": _as_json(mean_interval([count / per_token for count in each], seed)),
        "rms_side": math.sqrt(positions),
        "average_rate": size / math.sqrt(positions),
        "flops": None
        if None in flops.values()
        else sum((flops[choice] or 0) * n for choice, n in choices.items()) / len(rows),
        "flops_unit": FLOPS_UNIT,
    }
    if column.needs_scores:
        found["thresholds"] = list(column.thresholds.pair)
    return found


def _text(originals: Sequence[Row], rows: Sequence[Row], size: int, seed: int) -> dict[str, Any]:
    confidences = [text.mean_confidence(row.words or []) for row in rows]
    read = [value for value in confidences if value is not None]
    pairs = [
        text.character_errors(original.words, row.words or [])
        for original, row in zip(originals, rows, strict=True)
        if original.words
    ]
    words = [
        (height / size, errors, characters)
        for original, row in zip(originals, rows, strict=True)
        for height, errors, characters in text.word_errors(original.words or [], row.words or [])
    ]
    edges = text.bin_edges(text.BINS, size)
    return {
        "OCR-confidence": _as_json(mean_interval(read, seed), len(read)) if read else None,
        "OCR-pages-without-words": len(rows) - len(read),
        "OCR-confidence-originals": _mean([text.mean_confidence(row.words or []) for row in originals]),
        "CER": _as_json(ratio_interval([e for e, _ in pairs], [c for _, c in pairs], seed), len(pairs))
        if pairs
        else None,
        "CER-originals-without-words": len(rows) - len(pairs),
        "CER-by-relative-height": [
            {"from": low, "to": high, "words": len(inside), "CER": _share(inside)}
            for low, high, inside in _binned(words, edges)
        ],
    }


def _faces(originals: Sequence[Row], rows: Sequence[Row], size: int, seed: int) -> dict[str, Any]:
    per_image = [
        [
            (faces.relative_size(face, size), again)
            for face, again in zip(
                original.faces or [], faces.found_again(original.faces or [], row.faces or []), strict=True
            )
        ]
        for original, row in zip(originals, rows, strict=True)
    ]
    with_faces = [found for found in per_image if found]
    share = ratio_interval(
        [sum(again for _, again in found) for found in with_faces], [len(found) for found in with_faces], seed
    )
    every = [(relative, int(again), 1) for found in with_faces for relative, again in found]
    return {
        "faces-found-again": _as_json(share, len(with_faces)),
        "faces": len(every),
        "images-without-faces": len(rows) - len(with_faces),
        "faces-by-relative-size": [
            {"from": low, "to": high, "faces": len(inside), "found_again": _share(inside)}
            for low, high, inside in _binned(every, text.bin_edges(faces.BINS, size))
        ],
    }


_Sized = tuple[float, int, int]
"""Relative size of a word or face, its errors or successes, and their maximum."""


def _binned(items: Sequence[_Sized], edges: Sequence[float]) -> list[tuple[float, float, list[_Sized]]]:
    """Return the items in TokBench's bins of relative size, and in the one below, which it leaves out."""
    lower, upper = [0.0, *edges[:-1]], [*edges[:-1], math.inf]
    return [
        (low, 1.0 if high == math.inf else high, [item for item in items if low <= item[0] < high])
        for low, high in zip(lower, upper, strict=True)
    ]


def _share(items: Sequence[_Sized]) -> float | None:
    return sum(item[1] for item in items) / sum(item[2] for item in items) if items else None


def _text_values(original: Row, row: Row) -> dict[str, Any]:
    if original.words is None or row.words is None:
        return {}
    errors, characters = text.character_errors(original.words, row.words)
    return {
        "ocr_confidence": text.mean_confidence(row.words),
        "ocr_words": len(row.words),
        "character_errors": errors,
        "characters": characters,
    }


def _face_values(original: Row, row: Row) -> dict[str, Any]:
    if original.faces is None or row.faces is None:
        return {}
    return {
        "faces": len(original.faces),
        "faces_found_again": sum(faces.found_again(original.faces, row.faces)),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _as_json(estimate: Estimate | None, images: int = 2) -> dict[str, Any] | None:
    """Return value and interval; no interval for the figure of a single image."""
    if estimate is None:
        return None
    interval = [estimate.low, estimate.high]
    return {
        "value": estimate.value if math.isfinite(estimate.value) else None,
        "interval": interval if images > 1 and all(map(math.isfinite, interval)) else None,
    }
