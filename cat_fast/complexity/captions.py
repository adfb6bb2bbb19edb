"""Readers for caption files: one caption per line, or one JSON object per line with flags."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cat_fast.complexity.description import Description
from cat_fast.data.images.label_fields import given_labels
from cat_fast.data.text_files import parse_object, text_lines
from cat_fast.errors import UserError


def read_descriptions(
    path: Path, has_text: bool | None = None, has_faces: bool | None = None
) -> list[Description]:
    """Read descriptions in file order, skipping blank lines.

    Args:
        path: `.jsonl` (objects with "caption" and optionally "has_text", "has_faces") or `.txt` (one caption
            per line).
        has_text, has_faces: default flags of lines without their own.

    Raises:
        UserError: the file cannot be read, has another suffix, contains no caption, or has a malformed line
            (named by its number).
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(f"{path}: expected a .jsonl or .txt file of captions; rename or convert it")
    if path.suffix == ".txt":
        descriptions = [Description(line, has_text, has_faces) for _, line in text_lines(path)]
    else:
        descriptions = [describe(row, location, has_text, has_faces) for location, row in read_rows(path)]
    if not descriptions:
        raise UserError(f"{path}: the file contains no captions; expected one per line")
    return descriptions


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the JSON object of each line that is not blank.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object.
    """
    for number, line in text_lines(path):
        location = f"{path}, line {number}"
        try:
            yield location, parse_object(line)
        except ValueError as error:
            raise UserError(
                f'{location}: {error}; expected an object such as {{"caption": "..."}}'
            ) from error


def describe(
    row: dict[str, Any], location: str, has_text: bool | None = None, has_faces: bool | None = None
) -> Description:
    """Return the description in a JSON object; the flags apply if it does not set them.

    Raises:
        UserError: it has no caption, or a label is not valid; names the `location`.
    """
    try:
        labels = given_labels(row)
        flags = labels.get("has_text", has_text), labels.get("has_faces", has_faces)
        return Description(labels.get("caption", ""), *flags)
    except ValueError as error:  # a UserError, too
        raise UserError(f"{location}: {error}") from error
