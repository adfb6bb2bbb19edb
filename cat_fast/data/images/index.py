"""The image index: one JSON line per image, with its description, score and ratio."""

import io
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError
from cat_fast.integers import store_integers


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

    def __post_init__(self) -> None:
        store_integers(self, "score", "ratio")


def write_index(path: str | Path, records: list[ImageRecord]) -> None:
    """Write an index, atomically."""
    with atomic_write(path) as part:
        lines = (json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in records)
        part.write_text("".join(lines), encoding="utf-8")


def read_index(path: str | Path) -> list[ImageRecord]:
    """Return the records of an index; image paths are relative to the index's folder.

    Raises:
        UserError: the file is missing, or a line is not a valid record.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"image index {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"image index {path}: expected JSON lines in UTF-8, got binary data") from error
    return [parse_record(line, path, number) for number, line in enumerate(io.StringIO(text), start=1)]


def parse_record(line: str | bytes, index: Path, number: int) -> ImageRecord:
    """Return the record in one line of an index.

    Raises:
        UserError: the line is not a valid record.
    """
    try:
        record = ImageRecord(**json.loads(line))
        for text in (record.key, record.path):
            if not isinstance(text, str):
                raise TypeError(f"expected a string, got {text!r}")
        for value in (record.score, record.ratio):
            parse_integer(value)
    except (ValueError, TypeError) as error:
        raise UserError(f"image index {index}, line {number}: {error}") from error
    return replace(record, path=str(index.parent / record.path))


def parse_integer(value: Any) -> int | None:
    """Return the integer in a JSON or table field, such as 16 or 16.0; None for null.

    Raises:
        ValueError: the value is not an integer.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:
        raise ValueError(f"expected an integer, got {value!r}")
    return int(value)
