"""Descriptions read from files: one caption a line, or one JSON object a line with flags and score."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cat_fast.complexity.description import Description
from cat_fast.complexity.ratio import SCORES
from cat_fast.data.images.label_fields import given_labels
from cat_fast.data.text_files import parse_object, text_lines
from cat_fast.errors import UserError

SCORED_CAPTIONS = Path(__file__).parent / "assets" / "captions.jsonl"
"""The scored captions that ship with the project; see PROVENANCE.md beside them."""


def read_descriptions(path: Path, has_text: bool = False, has_faces: bool = False) -> list[Description]:
    """Descriptions in file order; blank lines are skipped.

    Args:
        path: `.jsonl` (objects with "caption", maybe "has_text", "has_faces") or `.txt` (a caption a line).
        has_text, has_faces: the flags of every line that does not give its own.

    Raises:
        UserError: the file cannot be read, has another suffix, holds no caption, or a line is malformed (the
            error names it by its number).
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(f"{path}: captions are read from .jsonl or .txt files; rename or convert it")
    if path.suffix == ".txt":
        descriptions = [Description(line, has_text, has_faces) for _, line in text_lines(path)]
    else:
        descriptions = [describe(row, where, has_text, has_faces) for where, row in read_rows(path)]
    if not descriptions:
        raise UserError(f"{path}: there is no caption in it; expected one a line")
    return descriptions


def read_scored(path: Path = SCORED_CAPTIONS) -> tuple[list[Description], list[int]]:
    """Descriptions and scores 1..9 of a `.jsonl` file whose objects have a "score"; UserError as above."""
    rows = list(read_rows(path))
    for where, row in rows:
        if type(row.get("score")) is not int or row["score"] not in SCORES:
            raise UserError(f'{where}: "score" must be a whole number from 1 to 9, got {row.get("score")!r}')
    if not rows:
        raise UserError(f"{path}: there is no scored caption in it; expected one JSON object a line")
    return [describe(row, where) for where, row in rows], [row["score"] for _, row in rows]


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the JSON object of each line that is not blank.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object.
    """
    for number, line in text_lines(path):
        where = f"{path}, line {number}"
        try:
            yield where, parse_object(line)
        except ValueError as error:
            raise UserError(f'{where}: {error}; expected an object such as {{"caption": "..."}}') from error


def describe(row: dict[str, Any], where: str, has_text: bool = False, has_faces: bool = False) -> Description:
    """Return the description in a JSON object; the flags apply if it does not set them.

    Raises:
        UserError: it has no caption, or a label is not valid; names the place `where`.
    """
    try:
        labels = given_labels(row)
        flags = labels.get("has_text", has_text), labels.get("has_faces", has_faces)
        return Description(labels.get("caption", ""), *flags)
    except ValueError as error:  # a UserError, too
        raise UserError(f"{where}: {error}") from error
