"""Descriptions of photographs from user-supplied captions.

In order of precedence: a row of a captions file, one caption for all images, a text file next to the image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cat_fast.complexity import Description
from cat_fast.complexity.captions import describe, read_rows
from cat_fast.data.images.caption_file import read_caption
from cat_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PhotoDescriptions:
    """Descriptions of a set of photographs.

    Args:
        caption: caption of every image not in `rows`; text files next to the images are then ignored.
        rows: rows of a captions file, from `read_photo_captions`.
        has_text, has_faces: default flags of captions without their own.

    Raises:
        UserError: the caption is blank.
    """

    caption: str | None = None
    rows: PhotoCaptions | None = None
    has_text: bool | None = None
    has_faces: bool | None = None

    def __post_init__(self) -> None:
        if self.caption is not None:
            Description(self.caption)  # reject a blank caption here rather than for every image

    def find(self, photo: Path) -> Description | None:
        """Return the description of `photo`, or None; raise UserError if its text file cannot be read."""
        row = self.rows and self.rows.find(photo)
        if row:
            return row
        caption = self.caption or read_caption(photo)
        return Description(caption, self.has_text, self.has_faces) if caption else None


class PhotoCaptions:
    """Rows of a captions file, each for one image.

    A name is a path relative to the captions file, with or without the suffix. A name without a folder that
    is not next to the captions file is that of an image in any folder.

    Args:
        path: the captions file.
        rows: descriptions by name.

    Raises:
        UserError: two names are the same path.
    """

    def __init__(self, path: Path, rows: Mapping[str, Description]) -> None:
        self._rows = rows
        self._by_path: dict[str, str] = {}
        self._by_name = rows.keys() - _names_in(path.parent)
        for name in rows:
            real = _real_path(path.parent / name)
            if real in self._by_path:
                raise UserError(f"{path}: {self._by_path[real]} and {name} are the same image; keep only one")
            self._by_path[real] = name

    def find(self, photo: Path) -> Description | None:
        """Return the description of `photo`, or None."""
        name = self._name(photo)
        return None if name is None else self._rows[name]

    def unmatched(self, photos: Iterable[Path]) -> list[str]:
        """Return the names that are not of any of the photographs."""
        matched = set(map(self._name, photos))
        return [name for name in self._rows if name not in matched]

    def _name(self, photo: Path) -> str | None:
        for real in (_real_path(photo), _real_path(photo.with_suffix(""))):
            if real in self._by_path:
                return self._by_path[real]
        return next((name for name in (photo.name, photo.stem) if name in self._by_name), None)


def _names_in(folder: Path) -> set[str]:
    """Return the names of the files in a folder, with and without their suffixes."""
    names = os.listdir(folder) if folder.is_dir() else []
    return {*names, *(Path(name).stem for name in names)}


def _real_path(path: Path) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # not a valid path
        return str(path)


def read_photo_captions(
    path: Path, *, has_text: bool | None = None, has_faces: bool | None = None
) -> PhotoCaptions:
    """Read a `.jsonl` file of {"file" or "key": ..., "caption": ..., "has_text": ..., "has_faces": ...}.

    "file" is a photograph's path, relative to this file, or its name; "key" is the same without the suffix.
    Flags default to the arguments.

    Raises:
        UserError: the file cannot be read, a line is malformed, or an image is listed twice.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: expected a .jsonl file of image captions, one JSON object per line")
    rows: dict[str, Description] = {}
    for where, row in read_rows(path):
        name = row.get("file", row.get("key"))
        if not isinstance(name, str) or not name:
            raise UserError(f'{where}: expected "file" or "key" to name the image')
        if name in rows:
            raise UserError(f"{where}: {name} already has a caption; keep only one")
        rows[name] = describe(row, where, has_text, has_faces)
    if not rows:
        raise UserError(f"{path}: the file contains no captions; expected one per line")
    return PhotoCaptions(path, rows)
