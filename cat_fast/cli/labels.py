"""Labels as command lines give them."""

from collections.abc import Sequence
from pathlib import Path

from cat_fast.data.text_files import text_lines
from cat_fast.errors import UserError


def parse_labels(given: Sequence[str], known: Sequence[str], option: str) -> list[str | int]:
    """Names or numbers of classes from the values of an option that may be repeated.

    A value may hold several with commas between, and a name may hold commas itself, as those of ImageNet do.

    Raises:
        UserError: there is no label in them.
    """
    found: list[str | int] = []
    for text in given:
        parts = [text] if text in known else [part.strip() for part in text.split(",") if part.strip()]
        found += [int(part) if part.isdecimal() and part not in known else part for part in parts]
    if not found:
        raise UserError(
            f"{option} {', '.join(map(repr, given))}: there is no label in it; expected names or numbers of"
            f" classes, such as {known[0]!r}, or leave it out"
        )
    return found


def read_classes(path: Path) -> list[str]:
    """Names of classes, one a line; UserError where there are none, or one comes twice."""
    names = [line for _, line in text_lines(path)]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: expected names of classes, one a line and each once")
    return names
