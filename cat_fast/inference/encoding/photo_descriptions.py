"""Descriptions of photographs from the user's words.

The most explicit counts: a row of a captions file, one caption for all images, a text file next to the image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cat_fast.complexity import Description
from cat_fast.complexity.captions import describe, read_rows
from cat_fast.data.images.caption_file import caption_beside
from cat_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PhotoDescriptions:
    """What the user said about images.

    Args:
        caption: for every image that `rows` does not name; text files beside them do not count then.
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
            Description(self.caption)  # refuses a blank one here rather than once an image

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
        UserError: the file cannot be read, a line is malformed, or two name the same image.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: captions of images are read from .jsonl files, one JSON object a line")
    rows: dict[str, Description] = {}
    for where, row in read_rows(path):
        name = row.get("file", row.get("key"))
        if not isinstance(name, str) or not name:
            raise UserError(f'{where}: expected "file" or "key" to name the image')
        if name in rows:
            raise UserError(f"{where}: {name} has a caption already; keep one")
        rows[name] = describe(row, where, has_text, has_faces)
    if not rows:
        raise UserError(f"{path}: there is no caption in it; expected one a line")
    return rows
