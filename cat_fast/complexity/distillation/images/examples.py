"""Images with target scores: rated photographs, and captioned images that a scorer of captions scores."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cat_fast.complexity.description import Description
from cat_fast.complexity.rated_captions import RATED_CAPTIONS, read_rated
from cat_fast.complexity.score import Scorer, require_scores
from cat_fast.data.images.index import ImageRecord, read_index
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError

RATED_FILE = RATED_CAPTIONS / "imagenet_sample.jsonl"
"""Packaged ratings of photographs that are not distributed."""
PHOTOGRAPHS = "photographs"
RATED = "rated"
"""Source of rated photographs."""
_CARD = "corpus.json"
"""File next to an index, with the licence of each source of images."""


@dataclass(frozen=True)
class ImageExample:
    """An image with its target."""

    key: str
    path: str
    source: str
    """`RATED`, `PHOTOGRAPHS`, or the first part of the image's class, such as "stamps"."""
    target: float
    """Mean rating, or expected score by the teacher."""


def rated_photographs(folder: Path) -> list[ImageExample]:
    """Return the photographs in a folder that the packaged ratings name.

    Raises:
        UserError: one of them is missing.
    """
    rated = read_rated([RATED_FILE])
    names = [row.image.partition(":")[2] for row in rated]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{folder}: {len(missing)} of {len(names)} rated photographs are missing, such as {missing[0]}"
        )
    return [
        ImageExample(name, str(folder / name), RATED, row.mean)
        for name, row in zip(names, rated, strict=True)
    ]


def captioned_images(source: str, teacher: Scorer, per_source: int) -> list[ImageExample]:
    """Return images with captions, whose targets are the teacher's expected scores of the captions.

    Args:
        source: `PHOTOGRAPHS`, or an image index (.jsonl) with captions.
        teacher: scores the captions.
        per_source: maximum number of images per source within an index, evenly spaced.

    Raises:
        UserError: the index cannot be read, or contains no captions.
    """
    records = _packaged() if source == PHOTOGRAPHS else [*_distinct(read_index(source))]
    captioned = [record for record in records if record.caption]
    if not captioned:
        raise UserError(f"--images {source}: contains no captions, from which the targets are scored")
    by_source: dict[str, list[ImageRecord]] = {}
    for record in captioned:
        by_source.setdefault(record.category.partition("/")[0] or Path(source).stem, []).append(record)
    chosen = [
        replace(record, category=name)
        for name, members in by_source.items()
        for record in (members if source == PHOTOGRAPHS else _evenly_spaced(members, per_source))
    ]
    scores = require_scores(teacher, [Description(r.caption, r.has_text, r.has_faces) for r in chosen])
    return [
        ImageExample(record.key, record.path, record.category, score.expected)
        for record, score in zip(chosen, scores, strict=True)
    ]


def licences(sources: Sequence[str]) -> dict[str, str]:
    """Return the licence per source of images, from the cards next to the indices."""
    found = {PHOTOGRAPHS: "see ATTRIBUTION.md of the packaged photographs"}
    for source in sources:
        card = Path(source).parent / _CARD
        if source != PHOTOGRAPHS and card.is_file():
            found |= json.loads(card.read_text(encoding="utf-8")).get("licences", {})
    return found


def _packaged() -> list[ImageRecord]:
    return [
        ImageRecord(
            key=photo.key,
            path=str(photo.path),
            caption=photo.caption,
            has_text=photo.has_text,
            has_faces=photo.has_faces,
            score=None,
            ratio=None,
            category=PHOTOGRAPHS,
        )
        for photo in photographs()
    ]


def _distinct(records: Sequence[ImageRecord]) -> Iterator[ImageRecord]:
    """Yield the first record of each file."""
    seen: set[str] = set()
    for record in records:
        if record.path not in seen:
            seen.add(record.path)
            yield record


def _evenly_spaced(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    if len(records) <= count:
        return [*records]
    return [records[i * len(records) // count] for i in range(count)]
