"""Memory and time of CAT against fixed 8x, 16x and 32x, and the share of scoring in the compute.

Memory is counted. Times on GPUs are bounds and predictions from data sheets, not measurements; those on CPUs
are of the newest committed results of the autoencoder.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.bounds.data_sheets import read_sheets
from benchmarks.bounds.steps import dit_step, vae_step
from benchmarks.efficiency import costs
from benchmarks.efficiency.row import Row
from benchmarks.shared.committed import committed

IMAGENET = {8: 0.06, 16: 0.49, 32: 0.45}
"""Shares of the ratios on ImageNet with the paper's thresholds."""
TRAINING = {8: 0.10, 16: 0.48, 32: 0.42}
"""Shares of the ratios in the tokenizer's training."""
TRAINED_IMAGES, SECONDS_PER_IMAGE = 380e6, 1.63
"""Images of the tokenizer's training set, and the published H100-seconds of describing and scoring one."""
TOKENIZER_STEPS, TOKENIZER_BATCH = 1_000_000, 512
CARDS = ("A100", "H100")
GENERATING = "generating, 250 steps with guidance"


def scoring_row(step_flops: Mapping[int, float], images: int, peak: float) -> Row:
    """Return the share of describing and scoring in the tokenizer's compute.

    Args:
        step_flops: FLOPs of a training step by ratio.
        images: images of that step.
        peak: FLOPs per second of an A100 in the run's format.
    """
    per_image = sum(share * step_flops[ratio] for ratio, share in TRAINING.items()) / images
    scoring = TRAINED_IMAGES * SECONDS_PER_IMAGE / 3600
    training = TOKENIZER_STEPS * TOKENIZER_BATCH * per_image / peak / 3600
    return Row(
        claim="describing and scoring 380 M images, share of the tokenizer's compute",
        unit="%",
        published="< 1",
        counted=100 * scoring / (scoring + training),
        explanation=f"By the published 1.63 s per image, {scoring:,.0f} H100-hours; the arithmetic of 1 M "
        f"steps takes {training:,.0f} A100-hours at the data sheet's peak, 2.5 times as many at 40 % of it.",
    )


def comparison() -> dict[str, Any]:
    """Return memory and time per image of CAT and fixed ratios, for each use."""
    sheets, assumed = read_sheets()
    cards = {name: sheets[name] for name in CARDS}
    uses: dict[str, dict[str, dict[int, float]]] = {}

    def put(use: str, figure: str, ratio: int, value: float) -> None:
        uses.setdefault(use, {}).setdefault(figure, {})[ratio] = value

    step_flops: dict[int, float] = {}
    measured = measured_coding()
    for ratio in costs.RATIOS:
        for use, counts in costs.coding(f"fixed_{ratio}x_c16", ratio).items():
            put(use, "GFLOPs", ratio, counts["flops"] / 1e9)
            put(use, "activation MiB", ratio, counts["peak_bytes"] / 2**20)
            put(use, "weight MiB", ratio, counts["weight_bytes"] / 2**20)
            for name, sheet in cards.items():
                put(use, f"{name} bound, ms", ratio, 1e3 * sheet.seconds(counts["flops"], 0, "float32"))
                predicted = costs.seconds(counts["calls"], "float32", sheet, assumed)
                put(use, f"{name} predicted, ms", ratio, 1e3 * predicted)
            seconds, peak = measured[use, ratio]
            put(use, "two CPU cores measured, ms", ratio, 1e3 * seconds)
            put(use, "two CPU cores measured, MiB", ratio, peak / 2**20)
        step = vae_step(f"vae_{ratio}x", f"fixed_{ratio}x_c16", ratio, 8, 64)
        step_flops[ratio] = step.flops
        use = "training the tokenizer"
        put(use, "GFLOPs", ratio, step.flops / step.images / 1e9)
        put(use, "activation MiB", ratio, costs.training_memory(f"fixed_{ratio}x_c16", ratio, 2) / 2 / 2**20)
        for name, sheet in cards.items():
            bound, predicted = costs.step_milliseconds(step, sheet, assumed)
            put(use, f"{name} bound, ms", ratio, bound)
            put(use, f"{name} predicted, ms", ratio, predicted)
        tokens = (256 // ratio) ** 2
        transformer = dit_step(f"dit_{ratio}x", "cat_xl", [tokens] * (16_384 // tokens), 16)
        one = costs.generating(tokens)
        repeats = costs.STEPS * costs.PASSES
        put("training the transformer", "GFLOPs", ratio, transformer.flops / transformer.images / 1e9)
        put(GENERATING, "GFLOPs", ratio, repeats * one["flops"] / 1e9)
        put(GENERATING, "activation MiB", ratio, one["peak_bytes"] / 2**20)
        put(GENERATING, "weight MiB", ratio, one["weight_bytes"] / 2**20)
        for name, sheet in cards.items():
            bound, predicted = costs.step_milliseconds(transformer, sheet, assumed)
            put("training the transformer", f"{name} bound, ms", ratio, bound)
            put("training the transformer", f"{name} predicted, ms", ratio, predicted)
            bound = sheet.seconds(one["flops"], 0, "bfloat16")
            predicted = costs.seconds(one["calls"], "bfloat16", sheet, assumed)
            use = GENERATING
            put(use, f"{name} bound, ms", ratio, 1e3 * repeats * bound)
            put(use, f"{name} predicted, ms", ratio, 1e3 * repeats * predicted)
    rows = {
        use: {
            figure: {**{f"{ratio}x": value for ratio, value in values.items()}, **_of_mix(figure, values)}
            for figure, values in figures.items()
        }
        for use, figures in uses.items()
    }
    nested = 4 * costs.tokenizer_parameters("cat_c16") / 2**20
    for use in ("encode", "decode"):
        rows[use]["weight MiB"]["CAT"] = nested
    a100 = sheets["A100"].matrix_flops(step.dtype)
    return {"uses": rows, "scoring": asdict(scoring_row(step_flops, 8, a100))}


def measured_coding() -> dict[tuple[str, int], tuple[float, float]]:
    """Return the measured seconds and peak bytes of encoding and decoding an image in fp32, by ratio."""
    cases = json.loads(committed("autoencoder").read_text(encoding="utf-8"))["cases"]
    found = {}
    for ratio in costs.RATIOS:
        for use in ("encode", "decode"):
            case = cases[f"heads512.{ratio}x.{use}.fp32"]
            found[use, ratio] = case["seconds"]["ours"]["median"], case["peak_bytes"]["ours"]
    return found


def _of_mix(figure: str, values: Mapping[int, float]) -> dict[str, float]:
    """Return the mean over the mix on ImageNet; memory is that of the largest image."""
    if "MiB" in figure:
        return {"CAT": max(values.values())}
    return {"CAT": sum(share * values[ratio] for ratio, share in IMAGENET.items())}
