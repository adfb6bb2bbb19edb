"""Readers for caption files: one caption per line, or one JSON object per line with flags and score."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cat_fast.complexity.description import Description
from cat_fast.complexity.ratio import SCORES
from cat_fast.errors import UserError

SCORED_CAPTIONS = Path(__file__).parent / "assets" / "captions.jsonl"
"""The packaged scored captions; see PROVENANCE.md in the same folder."""


def read_descriptions(path: Path, has_text: bool = False, has_faces: bool = False) -> list[Description]:
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
    descriptions = []
    for location, line in _lines(path):
        row = _json_object(line, location) if path.suffix == ".jsonl" else {"caption": line}
        descriptions.append(_description({"has_text": has_text, "has_faces": has_faces} | row, location))
    if not descriptions:
        raise UserError(f"{path}: the file contains no captions; expected one per line")
    return descriptions


def read_scored(path: Path = SCORED_CAPTIONS) -> tuple[list[Description], list[int]]:
    """Read descriptions and their scores 1..9 from a `.jsonl` file whose objects have a "score".

    Raises:
        UserError: as for `read_descriptions`, or a score is missing or out of range.
    """
    rows = [(location, _json_object(line, location)) for location, line in _lines(path)]
    for location, row in rows:
        if type(row.get("score")) is not int or row["score"] not in SCORES:
            raise UserError(f'{location}: "score" must be an integer from 1 to 9, got {row.get("score")!r}')
    if not rows:
        raise UserError(f"{path}: the file contains no scored captions; expected one JSON object per line")
    return [_description(row, location) for location, row in rows], [row["score"] for _, row in rows]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (location, text) of every non-blank line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    # Not splitlines(): JSON allows Unicode line separators inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _json_object(line: str, location: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f'{location}: not valid JSON ({error.msg}); expected an object such as {{"caption": "..."}}'
        ) from error
    if not isinstance(row, dict):
        raise UserError(f'{location}: expected a JSON object such as {{"caption": "..."}}, got {line[:60]}')
    return row


def _description(row: dict[str, Any], location: str) -> Description:
    try:
        return Description(row.get("caption", ""), row.get("has_text", False), row.get("has_faces", False))
    except UserError as error:
        raise UserError(f"{location}: {error}") from error
