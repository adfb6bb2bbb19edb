"""Stamps of Tux Paint: photographs and drawings, each with a one-line caption."""

from collections.abc import Iterator
from pathlib import Path

from cat_fast.data.corpus.sources.base import CorpusImage, Problem, Source, reduced, squared
from cat_fast.data.images.io import load_image

_MIN_SIDE = 64


def _images(folder: Path, problem: Problem) -> Iterator[CorpusImage]:
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        if path.name.endswith(("_flip.png", "_mirror.png")) or not text.exists():
            continue
        try:
            caption = text.read_text(encoding="utf-8").splitlines()[0].strip().rstrip(".!")
            image = load_image(path)
        except (OSError, ValueError, IndexError) as error:
            problem(path.name, str(error))
            continue
        if caption and min(image.size) >= _MIN_SIDE:
            parts = path.relative_to(folder).with_suffix("").parts
            inner = parts[parts.index("stamps") + 1 :]
            yield CorpusImage("-".join(inner), squared(reduced(image)), caption, path.stem, category=inner[0])


STAMPS = Source(
    name="stamps",
    packages=("tuxpaint-stamps-default",),
    patterns=("usr/share/tuxpaint/stamps/*.png", "usr/share/tuxpaint/stamps/*.txt"),
    images=_images,
    licence="GPL-2.0-or-later",
    shown=False,
    lossless=True,
    disk=300_000_000,
)
