"""Drawings of the Open Clip Art Library, captioned by their folders and names."""

import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageChops

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
_MAX_PIXELS = 16_000_000
"""Larger drawings take gigabytes of memory to decode."""
_MARGIN = 0.04
"""White border around a drawing, as a fraction of its longer side."""
_LEFT_OUT = (
    "buttons",
    "computer/buttons",
    "computer/icons",
    "logos",
    "recreation/games/cards",
    "shapes/stars",
    "special",
    "unsorted",
)
"""Folders whose names describe little, that hold trademarks, or one drawing in a thousand variants."""
_AUTHORS = re.compile(
    r"_(?:a\.?j|alan|alberto|andrea|anthony|arc|archi\w*|ashton|aubanel|benji|brice|dan|dave|dennis|didier|domas|"
    r"enrique|erwan|feli\w*|fran?cesco|frederic|fudriot|ganson|gerald|guillaume|hans|harald|hash|jakob|jarno|jean|"
    r"joel|johnny|jon|jonadab|jonathan|jordan|juliane|jurgen|leif|linda|lumen|mailto|marcelo|martin|mateya|matt|"
    r"matthew|mauro|michael|mimooh|mo|nicolas|nicu|nurbldoff|olivo|patricia|peterm\d*|petr|petri|renardjb|richard|"
    r"rick|rollandin|romus|saurabh|sergio|shandy|stefan|todd|tom|tristan|vikingdread|wes|wolfram|yves?|zazou)"
    r"(?=[_.\-\d]|$).*"
)
"""First names and pseudonyms of frequent authors, and what follows them."""
_SHORT = {"at", "cd", "go", "in", "no", "of", "on", "ox", "pc", "to", "tv", "up"}
"""Words of two letters that describe a drawing; others are initials and flags such as "bw"."""


def _images(folder: Path, problem: Problem) -> Iterator[CorpusImage]:
    seen: set[bytes] = set()
    for path in sorted(folder.rglob("*.png")):
        parts = path.relative_to(folder).with_suffix("").parts
        inner = parts[parts.index("png") + 1 :]
        words = caption_words(inner[-1])
        if not words or "/".join(inner).startswith(tuple(f"{name}/" for name in _LEFT_OUT)):
            continue
        try:
            image = _cropped(load_image(path, max_pixels=_MAX_PIXELS))
        except UserError as error:
            problem(path.name, str(error))
            continue
        if image is None or min(image.size) < _MIN_SIDE or max(image.size) > 3 * min(image.size):
            continue
        drawing = squared(reduced(image, _SIDE))
        if (look := _look(drawing)) in seen:
            continue
        seen.add(look)
        yield CorpusImage(
            "-".join(inner),
            drawing,
            f"{' '.join(words)}, clip art of {' '.join(words_of(inner[min(1, len(inner) - 2)]))}",
            "/".join([*inner[:-1], *words]),
            category=inner[0],
        )


def caption_words(stem: str) -> list[str]:
    """Return the words of a drawing's file name, without its author's."""
    words = words_of(_AUTHORS.sub("", stem.lower()))
    return [word for word in words if len(word) > 2 or word in _SHORT]


def _cropped(image: Image.Image) -> Image.Image | None:
    """Return a drawing without its page's white margins; None for an empty page."""
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    if box is None:
        return None
    margin = round(_MARGIN * max(box[2] - box[0], box[3] - box[1]))
    drawn = Image.new("RGB", (box[2] - box[0] + 2 * margin, box[3] - box[1] + 2 * margin), "white")
    drawn.paste(image.crop(box), (margin, margin))
    return drawn


def _look(drawing: Image.Image) -> bytes:
    """Return a coarse thumbnail, equal for one drawing at several sizes."""
    small = drawing.resize((12, 12), Image.Resampling.BOX)
    return small.point(lambda value: (value + 16) // 32).tobytes()


CLIP_ART = Source(
    name="clip_art",
    packages=("openclipart-png",),
    patterns=("usr/share/openclipart/png/*.png",),
    images=_images,
    licence="public domain",
    shown=True,
    lossless=True,
    disk=500_000_000,
    version=2,
)
