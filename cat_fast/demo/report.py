"""The demo's report as one self-contained HTML file.

Each part of the demo writes a section, sections/shipped.html or sections/training.html; the report consists
of those that exist.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from cat_fast.data.files import atomic_write
from cat_fast.data.images.io import load_image, tensor_to_image
from cat_fast.demo.descriptions import DescribedPhotograph
from cat_fast.evaluation.reconstruction import Reconstruction
from cat_fast.training.metrics.run_log import read_metrics

SECTIONS = ("shipped", "training")
"""Sections of a report, in order."""
_THUMBNAIL = 96
COLOURS = {8: "#c2410c", 16: "#0369a1", 32: "#4d7c0f"}


def write_report(
    path: Path,
    metrics: dict[str, Any],
    results: Sequence[Reconstruction],
    samples: Sequence[dict[str, Any]],
    runs: Path,
    described: Sequence[DescribedPhotograph],
) -> None:
    """Write the section of a training and the report at `path`, with embedded images and plots."""
    ratios = sorted(results[0].at)
    write_section(
        path,
        "training",
        metrics=metrics,
        ratios=ratios,
        colours=COLOURS,
        rows=[reconstruction_row(r) for r in results],
        labels=list(dict.fromkeys(s["label"] for s in samples)),
        samples={(s["label"], s["ratio"]): image_uri(s["image"]) for s in samples},
        tokens={s["ratio"]: s["tokens"] for s in samples},
        thumbnails={photo.photograph.key: thumbnail_uri(photo.photograph.path) for photo in described},
        tokenizer_plot=tokenizer_curves(runs / "tokenizer"),
        generator_plot=generator_curve(runs / "generator"),
    )


def write_section(path: Path, name: str, **values: Any) -> None:
    """Render one of `SECTIONS`, and the report at `path` from the sections next to it; both atomically."""
    environment = Environment(
        loader=PackageLoader("cat_fast.demo"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    section = path.parent / "sections" / f"{name}.html"
    with atomic_write(section) as part:
        part.write_text(environment.get_template(f"{name}.html.j2").render(**values), encoding="utf-8")
    present = [path.parent / "sections" / f"{name}.html" for name in SECTIONS]
    sections = [one.read_text(encoding="utf-8") for one in present if one.is_file()]
    with atomic_write(path) as part:
        part.write_text(environment.get_template("page.html.j2").render(sections=sections), encoding="utf-8")


def reconstruction_row(result: Reconstruction) -> dict[str, Any]:
    return {
        "record": result.record,
        "mean_colour_psnr": result.mean_colour_psnr,
        "original": image_uri(tensor_to_image(result.original)),
        "at": {
            ratio: {"at": a, "image": image_uri(tensor_to_image(a.image))} for ratio, a in result.at.items()
        },
    }


def thumbnail_uri(path: Path) -> str:
    """Encode an image file, scaled down, as a JPEG data URI."""
    image = load_image(path)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return image_uri(image)


def image_uri(image: Image.Image) -> str:
    """Encode an image as a JPEG data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return _uri("image/jpeg", buffer.getvalue())


def tokenizer_curves(run: Path) -> str:
    """Plot the L1 loss per ratio and the perceptual and GAN losses over the steps; return a data URI."""
    records = read_metrics(run)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
    for ratio, colour in COLOURS.items():
        _curve(left, records, f"l1_{ratio}x", f"{ratio}x", colour)
    left.set_title("L1 by ratio")
    _curve(right, records, "st_lpips_alex", "perceptual (ST-LPIPS, AlexNet)", "#7c3aed")
    _curve(right, records, "gan", "GAN, autoencoder", "#db2777")
    _curve(right, records, "discriminator", "GAN, discriminator", "#6b7280")
    right.set_title("other losses, unweighted")
    return _finish(figure, (left, right))


def generator_curve(run: Path) -> str:
    """Plot the noise prediction error over the steps, overall and per ratio; return a data URI."""
    records = read_metrics(run)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True)
    _curve(left, records, "loss", "all tokens", "#0f766e")
    left.set_title("noise prediction MSE")
    for ratio, colour in COLOURS.items():
        _curve(right, records, f"loss_{ratio}x", f"{ratio}x", colour)
    right.set_title("by ratio")
    return _finish(figure, (left, right))


def _curve(axis: plt.Axes, records: list[dict[str, float]], name: str, label: str, colour: str) -> None:
    """Plot the raw values, faintly, and their running mean over 5 % of the run."""
    points = np.array([(r["step"], r[name]) for r in records if name in r])
    if not len(points):
        return
    steps, values = points.T
    axis.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8)
    width = max(1, len(values) // 20)
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    axis.plot(steps[width - 1 :], mean, color=colour, label=label, linewidth=1.8)


def _finish(figure: plt.Figure, axes: Sequence[plt.Axes]) -> str:
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return _uri("image/png", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
