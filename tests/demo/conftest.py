"""Fixture: a miniature demo with an untrained tokenizer, plain squares as samples, and synthetic run logs."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cat_fast.complexity.ratios.image_ratios import index_photographs
from cat_fast.data.photographs import CATEGORIES, photographs
from cat_fast.demo import DemoSettings
from cat_fast.demo.descriptions import DescribedPhotograph
from cat_fast.demo.metrics import collect_metrics
from cat_fast.demo.report import write_report
from cat_fast.evaluation.reconstruction import Reconstruction, reconstruct
from cat_fast.training.metrics.run_log import METRICS
from tests.cli.conftest import tiny_tokenizer

SIZE = 64
LABELS = CATEGORIES[:2]
CAPTION = 'A sign reading <b>"no & yes"</b>'
"""A caption that must be escaped in HTML."""


@dataclass
class Miniature:
    out: Path
    metrics: dict[str, Any]
    results: list[Reconstruction]
    samples: list[dict[str, Any]]

    @property
    def report(self) -> Path:
        return self.out / "report.html"


@pytest.fixture(scope="session")
def miniature(tmp_path_factory) -> Miniature:
    out = tmp_path_factory.mktemp("demo")
    write_run(out / "runs" / "tokenizer", 60, {"l1_8x": 0.3, "l1_32x": 0.5, "st_lpips_alex": 0.7})
    write_run(out / "runs" / "generator", 30, {"loss_8x": 0.2, "images": 12, "tokens": 250})
    records = index_photographs(photographs("held_out")[:3])
    records[1] = replace(records[1], caption=CAPTION)
    results = reconstruct(tiny_tokenizer(), records, SIZE)
    samples = [
        {"label": label, "ratio": ratio, "tokens": (SIZE // ratio // 2) ** 2, "image": square(number, ratio)}
        for ratio in (8, 16, 32)
        for number, label in enumerate(LABELS)
    ]
    settings = asdict(DemoSettings(tokenizer_steps=60, generator_steps=30, ranks=2, resolution=SIZE))
    train = index_photographs(photographs("train")[:4])
    seconds = {"describe": 0.4, "train_tokenizer": 61.5}
    metrics = collect_metrics(out, settings, train, results, samples, seconds)
    pairs = zip(photographs("train")[:4], train, strict=True)
    # Another flag than the listed one, and a scorer without confidence.
    described = [
        DescribedPhotograph(photo, replace(record, has_text=True), None if number else 0.87)
        for number, (photo, record) in enumerate(pairs)
    ]
    metrics |= {"flags": "detectors 1", "photographs": [photo.to_json() for photo in described]}
    write_report(out / "report.html", metrics, results, samples, out / "runs", described)
    return Miniature(out, metrics, results, samples)


def square(number: int, ratio: int) -> Image.Image:
    """Return a sample with a unique colour."""
    return Image.new("RGB", (SIZE, SIZE), (40 + 100 * number, 5 * ratio, 90))


def write_run(folder: Path, steps: int, terms: dict[str, float]) -> None:
    folder.mkdir(parents=True)
    records = [{"step": s, "seconds": 0.5, "loss": 2 / (1 + s), **terms} for s in range(steps)]
    (folder / METRICS).write_text("".join(json.dumps(r) + "\n" for r in records))
