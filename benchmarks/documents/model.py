"""Tables of docs/models.md: sizes, comparison of attention readings, speed.

Sizes are counted on the meta device and listed with the published ones of tests/tokenizer/published.json; the
rest comes from committed benchmark results.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.documents import tables
from benchmarks.shared.configs import tokenizer_run
from benchmarks.shared.mixes import IMAGENET
from cat_fast import NestedAutoencoderKL
from cat_fast.models.build import build_model

DOCUMENT = tables.ROOT / "docs/models.md"
PUBLISHED = json.loads((tables.ROOT / "tests/tokenizer/published.json").read_text(encoding="utf-8"))
READINGS = {"heads_of_1": "heads of one dimension", "one_head": "one head"}


def filled(text: str) -> str:
    """Return the document with updated tables."""
    speed = tables.results("autoencoder")
    made = {
        "tokenizers": tokenizers(),
        "readings": readings(tables.results("attention_readings")),
        "literal": literal(speed),
        "stock": stock(speed),
        "breakdown": breakdown(speed),
    }
    return tables.fill(text, made)


def tokenizers() -> str:
    """Return one row per configuration."""
    header = (
        "configuration",
        "parameters, M",
        "published",
        "",
        "by ratio",
        "mean",
        'published as "FLOPs"',
        "",
    )
    rows = [
        describe(name, row["parameters"], PUBLISHED["gmac_imagenet"].get(name))
        for name, row in PUBLISHED["rows"].items()
        if "parameters" in row
    ]
    return tables.markdown(header, rows)


def readings(results: Mapping[str, Any]) -> str:
    """Return one row per reading of the attention: means and ranges over seeds."""
    rows = []
    for name, label in READINGS.items():
        runs = results["runs"][name]
        columns = [spread([run["training_loss"] for run in runs], 4)]
        for ratio in ("8", "16", "32"):
            decibels = spread([run["held_out"][ratio]["psnr"] for run in runs], 2)
            columns.append(
                f"{decibels} dB, {spread([run['held_out'][ratio]['perceptual'] for run in runs], 3)}"
            )
        rows.append((label, *columns))
    return tables.markdown(("attention", "training loss", "8x", "16x", "32x"), rows)


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def literal(results: Mapping[str, Any]) -> str:
    """Return the comparison of the literal reading with stock blocks."""
    rows = []
    for key, case in results["cases"].items():
        reading, ratio, which, _ = key.split(".")
        if reading == "heads512":
            seconds = {name: s["median"] for name, s in case["seconds"].items()}
            rows.append(
                (
                    f"{ratio} {which}",
                    f"{seconds['ours']:.2f}",
                    f"{seconds['nchw_eager']:.2f}",
                    f"{case['ratios']['nchw_eager']['median']:.2f} ×",
                )
            )
    return tables.markdown(("pass", "ours, s", "stock, s", "as fast"), rows)


def stock(results: Mapping[str, Any]) -> str:
    """Return the comparison of one head with every stock variant, the fastest first."""
    rows = []
    for key, case in results["cases"].items():
        reading, ratio, which, dtype = key.split(".")
        if reading == "heads1":
            ratios = {name: r["median"] for name, r in case["ratios"].items()}
            best = min(ratios, key=lambda name: ratios[name])
            rows.append(
                (
                    f"{ratio} {which}, {dtype}",
                    f"{case['seconds']['ours']['median']:.2f}",
                    f"**{ratios[best]:.2f} ×** ({best.replace('_', ' ')})",
                    ", ".join(
                        f"{r:.2f} × {name.replace('_', ' ')}" for name, r in ratios.items() if name != best
                    ),
                    f"{case['work']['gflops_per_second']:.0f}",
                )
            )
    header = ("pass", "ours, s", "the best stock variant", "the others", "GFLOP/s")
    return tables.markdown(header, rows)


def breakdown(results: Mapping[str, Any]) -> str:
    """Return our time by kind of work, and the live tensors at peak memory."""
    rows = []
    for key, case in results["cases"].items():
        parts = case["breakdown"]
        total = sum(parts["seconds"].values())
        shares = [f"{seconds / total:.0%}" for seconds in parts["seconds"].values()]
        held = [f"{(size or 0) / 2**20:.0f}" for size in parts["peak_bytes"].values()]
        rows.append((f"`{key}`", " / ".join(shares), " / ".join(held)))
    header = (
        "case",
        "time: convolution / norm / attention / rest",
        "MiB: convolution / norm / attention / rest / workspace",
    )
    return tables.markdown(header, rows)


def describe(name: str, published_parameters: int, published_gmac: float | None) -> Sequence[str]:
    """Return a configuration's row: parameters, and multiply-accumulates of one 512 px image, both ways."""
    config = tokenizer_run(name)
    with torch.device("meta"):
        model = build_model(NestedAutoencoderKL, config.model)
    parameters = sum(p.numel() for p in model.parameters())
    gmac = {ratio: multiply_accumulates(model, ratio) / 1e9 for ratio in model.ratios}
    mean = gmac[model.ratios[0]] if len(gmac) == 1 else weighted(gmac, IMAGENET)
    return (
        f"`{name}`",
        f"{parameters / 1e6:.2f}",
        f"{published_parameters / 1e6:g}",
        f"{parameters / published_parameters - 1:+.1%}",
        ", ".join(f"{ratio}x {value:.0f}" for ratio, value in gmac.items()) + " GMAC",
        f"{mean:.0f} GMAC",
        f"{published_gmac:g} GMAC" if published_gmac else "",
        f"{mean / published_gmac - 1:+.0%}" if published_gmac else "",
    )


def multiply_accumulates(model: Any, ratio: int, side: int = 512) -> float:
    """Count multiply-accumulates of encoding and decoding one image: half of the FLOPs that torch counts."""
    image = torch.empty(1, 3, side, side, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image, ratio)
    return counter.get_total_flops() / 2


def weighted(values: Mapping[int, float], shares: Mapping[int, float]) -> float:
    return sum(values[key] * share for key, share in shares.items())
