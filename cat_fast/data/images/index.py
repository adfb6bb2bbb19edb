"""The image index: one JSON line per image, with its description, score and ratio.

Only "path" must be set. Blank lines, other fields and a byte order mark are ignored; labels follow the rules
of `given_labels`.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cat_fast.data.files import atomic_write
from cat_fast.data.images.label_fields import given_labels, required_text
from cat_fast.data.ratio_origin import ScoredBy
from cat_fast.data.text_files import BYTE_ORDER_MARK, byte_lines, parse_object
from cat_fast.errors import UserError
from cat_fast.integers import store_integers


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """A described image; score and ratio are None until it is scored."""

    key: str
    path: str
    caption: str
    has_text: bool | None
    has_faces: bool | None
    score: int | None
    ratio: int | None
    category: str = ""
    scored_by: ScoredBy | None = None
    """Scorer of the score, and the thresholds that chose the ratio; None if not recorded."""
    expected: float | None = None
    """Expected value of the score before rounding."""

    def __post_init__(self) -> None:
        store_integers(self, "score", "ratio")


Scoring = Callable[[Sequence[ImageRecord]], list[ImageRecord]]
"""Sets missing scores and ratios of records."""
Report = Callable[[str, str], None]
"""Receives place and reason of what is left out."""

_HEAD = 512
"""Bytes that show another kind of file."""


def write_index(path: str | Path, records: list[ImageRecord], *, relative: bool = False) -> None:
    """Write an index, atomically.

    Args:
        relative: image paths are relative to the working directory, as `read_index` returns them, and are
            written relative to the index's folder. By default they are written as they are.
    """
    if relative:
        folder = Path(path).parent.resolve()
        records = [replace(r, path=os.path.relpath(Path(r.path).resolve(), folder)) for r in records]
    with atomic_write(path) as part:
        lines = (json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in records)
        part.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def read_index(path: str | Path, report: Report = lambda where, why: None) -> list[ImageRecord]:
    """Return the records of an index; image paths are relative to the index's folder.

    Raises:
        UserError: the file cannot be read, or a line is not a valid record.
    """
    path = Path(path)
    return [parse_record(line, path, number, report) for number, _, line in index_lines(path)]


def index_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset in bytes and content of each line that is not blank.

    Raises:
        UserError: the file cannot be read, or is not text.
    """
    if not path.exists():
        raise UserError(f"image index {path}: no such file")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if b"\0" in head and not head.removeprefix(BYTE_ORDER_MARK.encode()).lstrip().startswith(b"{"):
            raise UserError(f"image index {path}: expected JSON lines in UTF-8, got another kind of file")
        yield from byte_lines(path)
    except OSError as error:
        raise UserError(f"image index {path}: cannot be read ({error.strerror or error})") from error


def parse_record(
    line: str | bytes, index: Path, number: int, report: Report = lambda where, why: None
) -> ImageRecord:
    """Return the record in one line of an index; its key is its path if it has none.

    Args:
        report: see `given_labels`.

    Raises:
        UserError: the line is not a valid record.
    """
    where = f"image index {index}, line {number}"
    try:
        row = parse_object(line)
        path = required_text(row, "path")
        key = path if row.get("key") is None else required_text(row, "key")
        labels = given_labels(row, lambda label, why: report(f"{where}: {label}", why))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    unset: dict[str, Any] = {
        "caption": "",
        "has_text": None,
        "has_faces": None,
        "score": None,
        "ratio": None,
    }
    return ImageRecord(key=key, path=str(index.parent / path), **(unset | labels))
