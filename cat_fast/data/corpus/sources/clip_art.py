"""Drawings of the Open Clip Art Library, captioned by their folders and names."""

import re
from collections.abc import Iterator
from pathlib import Path

from cat_fast.data.corpus.sources.base import (
    CorpusImage,
    Problem,
    Source,
    reduced,
    squared,
    words_of,
)
from cat_fast.data.images.io import load_image
from cat_fast.errors import UserError

_MIN_SIDE = 64
_SIDE = 256
_ENDING = re.compile(r"_(?:[^_]*_)?\d+$")
"""Number of a drawing, with the truncated name of its author before it."""
_LEFT_OUT = {"logos", "buttons", "unsorted", "special"}
"""Folders whose names describe little, or that hold trademarks."""


def _images(folder: Path, problem: Problem) -> Iterator[CorpusImage]:
    for path in sorted(folder.rglob("*.png")):
        parts = path.relative_to(folder).with_suffix("").parts
        inner = parts[parts.index("png") + 1 :]
        words = words_of(_ENDING.sub("", inner[-1]))
        if inner[0] in _LEFT_OUT or not words:
            continue
        try:
            image = load_image(path)
        except UserError as error:
            problem(path.name, str(error))
            continue
        if min(image.size) < _MIN_SIDE or max(image.size) > 3 * min(image.size):
            continue
        yield CorpusImage(
            "-".join(inner),
            squared(reduced(image, _SIDE)),
            f"{' '.join(words)}, clip art of {' and '.join(words_of(inner[0]))}",
            "/".join([*inner[:-1], *words]),
            category=inner[0],
        )


CLIP_ART = Source(
    name="clip_art",
    packages=("openclipart-png",),
    patterns=("usr/share/openclipart/png/*.png",),
    images=_images,
    licence="public domain",
    shown=True,
    lossless=True,
    disk=500_000_000,
)
