"""Descriptions of the packaged photographs: flags by the detectors, scores and ratios by the captions."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cat_fast.complexity import choose_ratios, default_scorer
from cat_fast.complexity.description import Description
from cat_fast.complexity.ratios.image_ratios import index_photographs
from cat_fast.console import err
from cat_fast.data.files import write_json
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.images.io import load_image
from cat_fast.data.photographs import Photograph, photographs
from cat_fast.errors import UserError

LISTED = "the attribution list"
"""Source of flags where the detectors are not installed."""


@dataclass(frozen=True)
class DescribedPhotograph:
    """A photograph with the flags that were found, and the score that follows."""

    photograph: Photograph
    """As listed, with flags by people."""
    record: ImageRecord
    """With the flags that were found."""
    confidence: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the values for metrics.json."""
        photo, record = self.photograph, self.record
        return {
            "key": photo.key,
            "split": photo.split,
            "caption": photo.caption,
            "has_text": record.has_text,
            "has_faces": record.has_faces,
            "listed": {"has_text": photo.has_text, "has_faces": photo.has_faces},
            "score": record.score,
            "expected": record.expected,
            "confidence": self.confidence,
            "ratio": record.ratio,
        }


def describe_photographs(
    flags_file: Path, on_done: Callable[[], None] = lambda: None, split: str | None = None
) -> tuple[list[DescribedPhotograph], str]:
    """Find the flags of the packaged photographs and score them.

    Args:
        flags_file: file for the flags, from which another call reads them.
        on_done: called after each photograph.
        split: of the photographs; None for all of them.

    Returns:
        The photographs in order, and the source of the flags.
    """
    photos = [photo for photo in photographs() if split in (None, photo.split)]
    found, source = _flags(photos, flags_file, on_done)
    described = [
        replace(photo, has_text=has_text, has_faces=has_faces)
        for photo, (has_text, has_faces) in zip(photos, found, strict=True)
    ]
    scorer = default_scorer()
    results = choose_ratios([Description(p.caption, p.has_text, p.has_faces) for p in described], scorer)
    records = index_photographs(described, scorer)
    rows = zip(photos, records, results, strict=True)
    return [DescribedPhotograph(photo, record, r.confidence) for photo, record, r in rows], source


def records_of(described: Sequence[DescribedPhotograph], split: str) -> list[ImageRecord]:
    """Return the records of one split, in order."""
    return [photo.record for photo in described if photo.photograph.split == split]


def _flags(
    photos: Sequence[Photograph], path: Path, on_done: Callable[[], None]
) -> tuple[list[tuple[bool, bool]], str]:
    """Return whether each photograph contains text and faces, and the source."""
    from cat_fast.complexity.captioners.detectors import Detectors

    try:
        detectors = Detectors()
    except UserError as error:
        err.print(f"{error}; until then, flags are those of {LISTED}", markup=False, soft_wrap=True)
        return [(photo.has_text, photo.has_faces) for photo in photos], LISTED
    source = f"{detectors.name} {detectors.version}"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    flags = known["flags"] if known.get("source") == source else {}
    missing = [photo for photo in photos if photo.key not in flags]
    for photo in missing:
        flags[photo.key] = detectors.find_flags(load_image(photo.path))
        on_done()
    if missing:
        write_json(path, {"source": source, "flags": flags})
    return [(bool(text), bool(faces)) for text, faces in (flags[p.key] for p in photos)], source
