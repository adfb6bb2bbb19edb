"""Descriptions of photographs from user-supplied captions.

In order of precedence: a row of a captions file, one caption for all images, a text file next to the image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from cat_fast.complexity import Description, read_descriptions
from cat_fast.data.images.caption_file import read_caption
from cat_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PhotoDescriptions:
    """Descriptions of a set of photographs.

    Args:
        caption: caption of every image not in `rows`; text files next to the images are then ignored.
        rows: descriptions by file name, stem or path, from `read_photo_captions`.
        has_text, has_faces: default flags of captions without their own.

    Raises:
        UserError: the caption is blank.
    """

    caption: str | None = None
    rows: dict[str, Description] = field(default_factory=dict)
    has_text: bool = False
    has_faces: bool = False

    def __post_init__(self) -> None:
        if self.caption is not None:
            Description(self.caption)  # reject a blank caption here rather than for every image

    def find(self, photo: Path) -> Description | None:
        """Return the description of `photo`, or None; raise UserError if its text file cannot be read."""
        for name in (str(photo), photo.name, photo.stem):
            if name in self.rows:
                return self.rows[name]
        caption = self.caption or read_caption(photo)
        return Description(caption, self.has_text, self.has_faces) if caption else None


def read_photo_captions(
    path: Path, *, has_text: bool = False, has_faces: bool = False
) -> dict[str, Description]:
    """Read a `.jsonl` file of {"file" or "key": ..., "caption": ..., "has_text": ..., "has_faces": ...}.

    "file" is a photograph's path or file name, "key" its name without the suffix. Flags default to the
    arguments.

    Raises:
        UserError: the file cannot be read, a line is malformed, or an image is listed twice.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: expected a .jsonl file of image captions, one JSON object per line")
    descriptions = read_descriptions(path, has_text, has_faces)  # also checks that every line is an object
    lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    rows: dict[str, Description] = {}
    for number, (line, description) in enumerate(zip(lines, descriptions, strict=True), start=1):
        row = json.loads(line)
        name = row.get("file", row.get("key"))
        if not isinstance(name, str) or not name:
            raise UserError(f'{path}, caption {number}: expected "file" or "key" to name the image')
        if name in rows:
            raise UserError(f"{path}, caption {number}: {name} already has a caption; keep only one")
        rows[name] = description
    return rows
