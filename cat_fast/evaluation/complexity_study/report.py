"""Files of the study: JSON, Parquet, plots, and a self-contained HTML report."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from jinja2 import Environment, PackageLoader
from PIL import Image

from cat_fast.data.files import atomic_write, write_json
from cat_fast.evaluation.complexity_study.plots import draw_plots
from cat_fast.evaluation.complexity_study.study import Sample, disagreements, fitted_ratios

_THUMBNAIL = 160


def write_report(
    out: Path,
    results: dict[str, Any],
    sample: Sample,
    load: Callable[[str], Image.Image] | None,
    gallery: int,
) -> None:
    """Write study.json, images.parquet, the plots and report.html into a folder.

    Args:
        load: returns an image by its key; None for a report without images.
        gallery: images per disagreement.
    """
    write_json(out / "study.json", results)
    _write_rows(out / "images.parquet", sample)
    plots = draw_plots(results, sample)
    for name, content in plots.items():
        with atomic_write(out / f"{name}.png") as part:
            part.write_bytes(content)
    environment = Environment(
        loader=PackageLoader("cat_fast.evaluation.complexity_study"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("study.html.j2").render(
        results=results,
        plots={name: _uri("image/png", content) for name, content in plots.items()},
        gallery=_gallery(sample, load, gallery) if load is not None and gallery else [],
    )
    with atomic_write(out / "report.html") as part:
        part.write_text(html, encoding="utf-8")


def _write_rows(path: Path, sample: Sample) -> None:
    """Write one row per image: errors, metrics, best ratio, and the ratio by each metric."""
    best = sample.best()
    columns: dict[str, Any] = {"key": sample.keys, "best_ratio": best}
    for i, ratio in enumerate(sample.ratios):
        columns |= {f"mse_{ratio}x": sample.errors[:, i], f"lpips_{ratio}x": sample.distances[:, i]}
    for metric in sample.metrics:
        columns |= {metric.name: metric.values, f"{metric.name}, ratio": fitted_ratios(metric.values, best)}
    with atomic_write(path) as part:
        pyarrow.parquet.write_table(pyarrow.table(columns), part, compression="zstd")


def _gallery(sample: Sample, load: Callable[[str], Image.Image], count: int) -> list[dict[str, Any]]:
    """Return the images on which metrics disagree most (Figure 3)."""
    best = sample.best()
    rows = []
    for title, indices in disagreements(sample, count):
        images = [
            {
                "uri": _thumbnail(load(sample.keys[i])),
                "key": sample.keys[i],
                "best": int(best[i]),
                "values": {metric.name: f"{metric.values[i]:.4g}" for metric in sample.metrics},
            }
            for i in indices
        ]
        rows.append({"title": title, "images": images})
    return rows


def _thumbnail(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return _uri("image/jpeg", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
