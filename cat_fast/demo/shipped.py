"""The demo of the shipped models: reconstructions of held-out photographs, and samples of prompts."""

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cat_fast.complexity import Description, RatioThresholds, default_scorer, require_scores
from cat_fast.console import err, progress
from cat_fast.data.files import write_json
from cat_fast.data.folder_lock import locked
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.photographs import photographs
from cat_fast.demo.descriptions import DescribedPhotograph, describe_photographs
from cat_fast.demo.report import COLOURS, image_uri, reconstruction_row, write_section
from cat_fast.demo.run import require_own_folder
from cat_fast.evaluation.reconstruction import Reconstruction, reconstruct, summarize
from cat_fast.generator.sampling import guidance_scales
from cat_fast.inference.pipeline.loading import load_pipeline
from cat_fast.processor import processor_name
from cat_fast.weights.shipped import TABLES, installed_folder

PROMPTS = (
    "smiling face with sunglasses",
    "penguin",
    "red apple",
    "pizza",
    "light bulb",
    "red heart",
    "rainbow",
    "apple with sunglasses",
)
RESOLUTION = 256
"""Side of the photographs in pixels."""
HELD_OUT = "held_out"


def run_shipped_demo(out: Path) -> dict[str, Any]:
    """Show the shipped models in `out`: write report.html and shipped.json; return the content of the latter.

    Raises:
        UserError: the models are missing from this installation; `out` holds a demo of an earlier version, is
            in use by another process or cannot be written.
    """
    with locked(out, "running a demo"):
        require_own_folder(out)
        return _run(out)


def _run(out: Path) -> dict[str, Any]:
    started = time.perf_counter()
    pipeline = load_pipeline(installed_folder("nano"))
    pipeline.set_progress_bar_config(disable=True)
    ratios = sorted(pipeline.vae.ratios)
    with progress("steps") as bars:
        bar = bars.add_task("describe photographs", total=len(photographs(HELD_OUT)))
        held_out, source = describe_photographs(out / "flags.json", lambda: bars.advance(bar), HELD_OUT)
        records = [one.record for one in held_out]
        bar = bars.add_task("reconstruct photographs", total=len(records))
        results = reconstruct(pipeline.vae, records, RESOLUTION, lambda: bars.advance(bar))
        bar = bars.add_task("draw prompts", total=pipeline.default_steps * len(ratios))
        samples: dict[tuple[str, int], Image.Image] = {}
        tokens: dict[int, int] = {}
        for ratio in ratios:
            drawn = pipeline(
                list(PROMPTS),
                ratio=ratio,
                generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
                callback_on_step_end=lambda *_: bars.advance(bar),
                callback_on_step_end_tensor_inputs=(),
            )
            tokens[ratio] = drawn.tokens[0]
            samples |= {(prompt, ratio): image for prompt, image in zip(PROMPTS, drawn.images, strict=True)}
    prompts = _score(pipeline.thresholds)
    metrics = {
        "resolution": RESOLUTION,
        "sample_resolution": pipeline.resolution,
        "steps": pipeline.default_steps,
        "guidance": {str(f): guidance_scales(pipeline.default_guidance, [f])[0] for f in ratios},
        "held_out": summarize(results),
        "flags": source,
        "photographs": [one.to_json() for one in held_out],
        "prompts": prompts,
        "tokens": {str(ratio): count for ratio, count in tokens.items()},
        "machine": {
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
            "platform": f"{platform.system()} {platform.machine()}",
            "torch": torch.__version__,
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_section(
        out / "report.html",
        "shipped",
        metrics=metrics,
        ratios=ratios,
        colours=COLOURS,
        rows=_rows(results, held_out),
        prompts=prompts,
        samples={key: image_uri(image) for key, image in samples.items()},
        tokens=tokens,
        tables=_tables(),
    )
    write_json(out / "shipped.json", metrics)
    err.print(f"{metrics['seconds']} s")
    return metrics


def _rows(
    results: Sequence[Reconstruction], described: Sequence[DescribedPhotograph]
) -> list[dict[str, Any]]:
    """Return the rows of the photographs, with flags and confidence."""
    return [
        {**reconstruction_row(result), "flags": _flags(one.record), "confidence": one.confidence}
        for result, one in zip(results, described, strict=True)
    ]


def _flags(record: ImageRecord) -> str:
    flags = (("text", record.has_text), ("faces", record.has_faces))
    return " and ".join(name for name, flag in flags if flag) or "none"


def _score(thresholds: RatioThresholds) -> list[dict[str, Any]]:
    """Return text, score, confidence and ratio of each prompt."""
    scores = require_scores(default_scorer(), [Description(prompt) for prompt in PROMPTS])
    return [
        {
            "text": prompt,
            "score": score.score,
            "confidence": score.confidence,
            "ratio": thresholds.ratio_of(score),
        }
        for prompt, score in zip(PROMPTS, scores, strict=True)
    ]


def _tables() -> list[dict[str, Any]]:
    path = installed_folder("nano") / TABLES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
