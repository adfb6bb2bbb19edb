"""Descriptions read from files: one caption a line, or one JSON object a line with flags and score."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cat_fast.complexity.description import Description
from cat_fast.complexity.ratio import SCORES
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
    descriptions = []
    for where, line in _lines(path):
        row = _json_object(line, where) if path.suffix == ".jsonl" else {"caption": line}
        descriptions.append(_description({"has_text": has_text, "has_faces": has_faces} | row, where))
    if not descriptions:
        raise UserError(f"{path}: there is no caption in it; expected one a line")
    return descriptions


def read_scored(path: Path = SCORED_CAPTIONS) -> tuple[list[Description], list[int]]:
    """Descriptions and scores 1..9 of a `.jsonl` file whose objects have a "score"; UserError as above."""
    rows = [(where, _json_object(line, where)) for where, line in _lines(path)]
    for where, row in rows:
        if type(row.get("score")) is not int or row["score"] not in SCORES:
            raise UserError(f'{where}: "score" must be a whole number from 1 to 9, got {row.get("score")!r}')
    if not rows:
        raise UserError(f"{path}: there is no scored caption in it; expected one JSON object a line")
    return [_description(row, where) for where, row in rows], [row["score"] for _, row in rows]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    # Not splitlines(): JSON allows the Unicode line separators inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f'{where}: not JSON ({error.msg}); expected an object such as {{"caption": "..."}}'
        ) from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: expected a JSON object such as {{"caption": "..."}}, got {line[:60]}')
    return row


def _description(row: dict[str, Any], where: str) -> Description:
    try:
        return Description(row.get("caption", ""), row.get("has_text", False), row.get("has_faces", False))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
