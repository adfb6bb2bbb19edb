"""The image index: one line of JSON an image, with its description, score and ratio."""

import io
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """A described and scored image."""

    key: str
    path: str
    caption: str
    has_text: bool
    has_faces: bool
    score: int
    ratio: int
    category: str = ""


def write_index(path: str | Path, records: list[ImageRecord]) -> None:
    with atomic_write(path) as part:
        lines = (json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in records)
        part.write_text("".join(lines), encoding="utf-8")


def read_index(path: str | Path) -> list[ImageRecord]:
    """Records of an index; relative image paths are taken from the index's own folder.

    Raises:
        UserError: no such file, or a line that is not a record.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"image index {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"image index {path}: JSON lines were expected, this is no text") from error
    return [parse_record(line, path, number) for number, line in enumerate(io.StringIO(text), start=1)]


def parse_record(line: str | bytes, index: Path, number: int) -> ImageRecord:
    """One line of an index.

    Raises:
        UserError: it is no record.
    """
    try:
        record = ImageRecord(**json.loads(line))
        for text in (record.key, record.path):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is no text")
        for value in (record.score, record.ratio):
            whole_number(value)
    except (ValueError, TypeError) as error:
        raise UserError(f"image index {index}, line {number}: {error}") from error
    return replace(record, path=str(index.parent / record.path))


def whole_number(value: Any) -> int | None:
    """The integer that a field of JSON or of a table holds, such as 16 or 16.0; None if it holds nothing.

    Raises:
        ValueError: it holds anything else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)
