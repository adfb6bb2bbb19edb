"""Which compression ratio a photograph gets: a fixed one, or what its description earns.

A description comes from the user's words, most explicit first: a row of a captions file, one caption for
all pictures, a text file beside the picture. A picture with none is judged by its size as a JPEG.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from cat_fast.complexity import (
    RATIOS,
    Description,
    RatioThresholds,
    choose_ratio,
    jpeg_ratio,
    read_descriptions,
)
from cat_fast.complexity.jpeg_size import JPEG_SIDE
from cat_fast.data.images.caption_file import caption_beside
from cat_fast.data.images.io import image_to_bytes, resize_center_crop
from cat_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RatioChoice:
    """A ratio and what it rests on."""

    ratio: int
    source: str
    """One of "fixed", "caption" and "jpeg size"."""
    why: str
    """The same for people: the caption where there is one."""
    score: int | None = None
    """Complexity score 1..9, where a caption was scored."""


RatioChooser = Callable[[Path, Image.Image], RatioChoice]
"""(file, its picture as `load_image` gives it) -> choice. Raises UserError for this picture alone."""


def fixed_ratio(ratio: int) -> RatioChooser:
    """Gives every picture `ratio`."""
    choice = RatioChoice(ratio=ratio, source="fixed", why=f"fixed {ratio}x")
    return lambda photo, image: choice


def adaptive_ratio(
    descriptions: PhotoDescriptions, thresholds: RatioThresholds | None = None
) -> RatioChooser:
    """Gives each picture the ratio of its description's score, or of its JPEG size where it has none."""

    def choose(photo: Path, image: Image.Image) -> RatioChoice:
        description = descriptions.find(photo)
        if description is None:
            ratio = jpeg_ratio(image_to_bytes(resize_center_crop(image, JPEG_SIDE)))
            return RatioChoice(ratio=ratio, source="jpeg size", why="no caption; by JPEG size")
        result = choose_ratio(description, thresholds=thresholds)
        return RatioChoice(ratio=result.ratio, source="caption", why=description.caption, score=result.score)

    return choose


@dataclass(frozen=True, kw_only=True)
class PhotoDescriptions:
    """What the user said about pictures.

    Args:
        caption: for every picture that `rows` does not name; text files beside them do not count then.
        rows: descriptions by file name, stem or path, from `read_photo_captions`.
        has_text, has_faces: the flags of captions that do not bring their own.

    Raises:
        UserError: a blank caption.
    """

    caption: str | None = None
    rows: dict[str, Description] = field(default_factory=dict)
    has_text: bool = False
    has_faces: bool = False

    def __post_init__(self) -> None:
        if self.caption is not None:
            Description(self.caption)  # refuses a blank one here rather than once a picture

    def find(self, photo: Path) -> Description | None:
        """The description of `photo`, or None; UserError when the text file beside it cannot be read."""
        for name in (str(photo), photo.name, photo.stem):
            if name in self.rows:
                return self.rows[name]
        caption = self.caption or caption_beside(photo)
        return Description(caption, self.has_text, self.has_faces) if caption else None


def read_photo_captions(
    path: Path, *, has_text: bool = False, has_faces: bool = False
) -> dict[str, Description]:
    """Reads a `.jsonl` file of {"file" or "key": ..., "caption": ..., "has_text": ..., "has_faces": ...}.

    "file" is a photograph's path or file name, "key" its name without the suffix; the flags default to the
    arguments.

    Raises:
        UserError: the file cannot be read, a line is malformed, or two name the same picture.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: captions of pictures are read from .jsonl files, one JSON object a line")
    descriptions = read_descriptions(path, has_text, has_faces)  # from here on every line is a sound object
    lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    rows: dict[str, Description] = {}
    for number, (line, description) in enumerate(zip(lines, descriptions, strict=True), start=1):
        row = json.loads(line)
        name = row.get("file", row.get("key"))
        if not isinstance(name, str) or not name:
            raise UserError(f'{path}, caption {number}: expected "file" or "key" to name the picture')
        if name in rows:
            raise UserError(f"{path}, caption {number}: {name} has a caption already; keep one")
        rows[name] = description
    return rows


def require_served(ratio: int | None, served: tuple[int, ...]) -> None:
    """Raises UserError where a tokenizer of ratios `served` cannot do `ratio`; None stands for adaptive."""
    has = ", ".join(map(str, served))
    if ratio is not None and ratio not in served:
        raise UserError(f"this tokenizer has no ratio {ratio}; it was trained for {has}")
    if ratio is None and not set(RATIOS) <= set(served):
        wanted = ", ".join(map(str, RATIOS))
        raise UserError(f"adaptive ratios need a tokenizer of ratios {wanted}; this one has {has}: fix one")
