"""Metrics of the demo's report, as JSON values."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cat_fast.complexity import (
    RatioThresholds,
    default_scorer,
    default_thresholds,
    mean_tokens,
    ratio_mix,
    require_scores,
    scored_by,
    tokens_per_image,
)
from cat_fast.complexity.rated_captions import RATED_CAPTIONS, read_rated
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.evaluation.reconstruction import Reconstruction, summarize
from cat_fast.processor import processor_name
from cat_fast.training.metrics.run_log import read_metrics

FINAL_STEPS = 20
"""Final training metrics are means over this many last steps."""


def collect_metrics(
    out: Path,
    settings: dict[str, Any],
    train: Sequence[ImageRecord],
    results: Sequence[Reconstruction],
    samples: Sequence[dict[str, Any]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Return the content of metrics.json."""
    return {
        "settings": settings,
        "machine": {
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
            "platform": f"{platform.system()} {platform.machine()}",
            "torch": torch.__version__,
        },
        "complexity": _complexity([*train, *(r.record for r in results)]),
        "held_out": summarize(results),
        "images": [_image(r) for r in results],
        "tokenizer_training": _training(out / "runs" / "tokenizer"),
        "generator_training": _training(out / "runs" / "generator"),
        "samples": [{k: s[k] for k in ("label", "ratio", "tokens")} for s in samples],
        "seconds": seconds,
    }


def latent_deviations(folder: Path) -> dict[str, Any]:
    """Return number and standard deviation of the latents of each ratio, in the tokenizer's scale.

    `std` is the root mean square over channels; every image weighs alike.
    """
    return {
        str(ratio): {
            "count": moments.count,
            "std": math.hypot(*moments.std) / math.sqrt(len(moments.std)),
            "std_of_channels": list(moments.std),
        }
        for ratio, moments in LatentDataset(folder).moments.items()
    }


def _complexity(records: Sequence[ImageRecord]) -> dict[str, Any]:
    """Return the token budgets of the caption set and of the photographs (at 512 px)."""
    thresholds = default_thresholds()
    descriptions = [row.description for row in read_rated([RATED_CAPTIONS / "written.jsonl"])]
    return {
        **asdict(scored_by(default_scorer(), thresholds)),
        "thresholds": list(thresholds.pair),
        "fixed_16x_tokens": tokens_per_image(16),
        "captions": _budget(thresholds, [s.score for s in require_scores(default_scorer(), descriptions)]),
        "photographs": _budget(thresholds, [r.score for r in records if r.score is not None]),
    }


def _budget(thresholds: RatioThresholds, scores: Sequence[int]) -> dict[str, Any]:
    mix = ratio_mix(thresholds.ratios(scores))
    tokens = mean_tokens(mix)
    return {
        "count": len(scores),
        "mix": {str(f): share for f, share in mix.items()},
        "mean_tokens": tokens,
        "relative_to_fixed_16x": tokens / tokens_per_image(16),
    }


def _image(result: Reconstruction) -> dict[str, Any]:
    record = result.record
    return {
        "key": record.key,
        "caption": record.caption,
        "score": record.score,
        "ratio": record.ratio,
        "mean_colour_psnr": result.mean_colour_psnr,
        "at": {
            str(f): {"psnr": a.psnr, "perceptual": a.perceptual, "tokens": a.tokens}
            for f, a in result.at.items()
        },
    }


def _training(run: Path) -> dict[str, Any]:
    records = read_metrics(run)
    last = records[-FINAL_STEPS:]
    names = sorted({name for r in last for name in r} - {"step", "seconds"})
    final = {}
    for name in names:
        values = [r[name] for r in last if name in r]
        final[name] = sum(values) / len(values)
    return {
        "steps": len(records),
        "seconds": round(sum(r["seconds"] for r in records), 1),
        "first_loss": records[0]["loss"],
        "final_loss": final["loss"],
        "final_over_first": final["loss"] / records[0]["loss"],
        "final": final,
    }
