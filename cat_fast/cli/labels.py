"""Parsing of class labels from command-line options and files."""

from collections.abc import Sequence
from pathlib import Path

from cat_fast.data.text_files import text_lines
from cat_fast.errors import UserError


def parse_labels(values: Sequence[str], known: Sequence[str], option: str) -> list[str | int]:
    """Parse class names or numbers from the values of a repeatable option.

    A value may be a comma-separated list. Class names may contain commas themselves, as in ImageNet.

    Raises:
        UserError: the values contain no label.
    """
    found: list[str | int] = []
    for text in values:
        parts = [text] if text in known else [part.strip() for part in text.split(",") if part.strip()]
        found += [int(part) if part.isdecimal() and part not in known else part for part in parts]
    if not found:
        raise UserError(
            f"{option} {', '.join(map(repr, values))}: expected class names or numbers, such as {known[0]!r};"
            " list at least one, or omit the option"
        )
    return found


def read_classes(path: Path) -> list[str]:
    """Read class names, one per line.

    Raises:
        UserError: the file cannot be read, is empty, or contains a name twice.
    """
    names = [line for _, line in text_lines(path)]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: expected class names, one per line, without duplicates")
    return names
