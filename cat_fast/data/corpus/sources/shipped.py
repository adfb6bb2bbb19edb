"""The photographs that this project ships, with their own split."""

from collections.abc import Iterator
from pathlib import Path

from cat_fast.data.corpus.sources.base import CorpusImage, Problem, Source, reduced
from cat_fast.data.images.io import load_image
from cat_fast.data.photographs import photographs


def _images(folder: Path, problem: Problem) -> Iterator[CorpusImage]:
    for shown in photographs():
        yield CorpusImage(
            shown.key,
            reduced(load_image(shown.path)),
            shown.caption,
            shown.key,
            category=shown.category,
            has_text=shown.has_text,
            has_faces=shown.has_faces,
            split=shown.split,
        )


PHOTOGRAPHS = Source(
    name="photographs",
    packages=(),
    patterns=(),
    images=_images,
    licence="by file (ATTRIBUTION.md of the photographs)",
    shown=True,
    lossless=False,
    disk=20_000_000,
    repeats=12,
)
