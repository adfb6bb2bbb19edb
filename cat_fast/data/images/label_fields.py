"""Labels in JSON objects and table rows: the rules of image indices, sidecars, samples and caption files."""

from collections.abc import Callable, Mapping
from typing import Any

from cat_fast.data.ratio_origin import ScoredBy
from cat_fast.data.text_files import strip_text, valid_text

LABELS = ("score", "expected", "ratio", "has_text", "has_faces", "caption", "category", "scored_by")
"""Names of all labels."""
SCORES = range(1, 10)
"""Complexity scores, from 1 (a plane in the sky) to 9 (a newspaper page)."""


def given_labels(
    row: Mapping[str, Any], report: Callable[[str, str], None] = lambda label, why: None
) -> dict[str, Any]:
    """Return the labels that a row sets; missing and null fields are left out, other fields are ignored.

    Numbers that are not a complexity score or an integer ratio are other quantities of these names, such as
    an aesthetic score or an aspect ratio: they are reported and left out, and so is any value of "expected"
    that is not an expected score. A list of captions is joined.

    Args:
        report: receives the label and the reason for a number that is left out.

    Raises:
        ValueError: a label is not valid.
    """
    found: dict[str, Any] = {}
    for label in LABELS:
        value = row.get(label)
        if value is None or value != value:  # tables have NaN for a missing value
            continue
        try:
            found[label] = _READERS[label](value)
        except _OtherQuantity as error:
            report(label, str(error))
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    return found


def required_text(row: Mapping[str, Any], field: str) -> str:
    """Return a field that must be set to text; an integer is converted.

    Raises:
        ValueError: it is missing, or not text.
    """
    value = row.get(field)
    if value is None:
        raise ValueError(f"the field {field} is missing")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field}: expected text, got {value!r}")
    return value


class _OtherQuantity(ValueError):
    """Raised for a number that cannot be what its label means."""


def _score(value: Any) -> int:
    score = _integer(value, " from 1 to 9")
    if score not in SCORES:
        raise _OtherQuantity(f"expected an integer from 1 to 9, got {value!r}")
    return score


def _expected(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not SCORES[0] <= value <= SCORES[-1]:
        raise _OtherQuantity(f"expected a number from 1 to 9, got {value!r}")
    return float(value)


def _ratio(value: Any) -> int:
    return _integer(value)


def _integer(value: Any, limits: str = "") -> int:
    """Return an integer, also one stored as a float."""
    expected = f"expected an integer{limits}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(expected)
    if value % 1 != 0:
        raise _OtherQuantity(expected)
    return int(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def _caption(value: Any) -> str:
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"expected text or a list of texts, got {value!r}")
    texts = [text for caption in captions if (text := strip_text(valid_text(caption)))]
    if len(texts) > 1:
        texts = [text if text.endswith((".", "!", "?")) else f"{text}." for text in texts]
    return " ".join(texts)


def _category(value: Any) -> str:
    if isinstance(value, str):
        return strip_text(valid_text(value))
    try:
        return str(_integer(value))
    except ValueError as error:
        raise ValueError(f"expected a name or a number, got {value!r}") from error


def _scored_by(value: Any) -> ScoredBy | None:
    try:
        return ScoredBy.of(value)
    except ValueError as error:
        raise _OtherQuantity(str(error).removeprefix("scored_by: ")) from error


_READERS: dict[str, Callable[[Any], Any]] = {
    "score": _score,
    "expected": _expected,
    "ratio": _ratio,
    "has_text": _flag,
    "has_faces": _flag,
    "caption": _caption,
    "category": _category,
    "scored_by": _scored_by,
}
