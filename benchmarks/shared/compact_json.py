"""JSON of results with short lists and objects on one line each, to keep committed files small."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cat_fast.data.files import atomic_write

WIDTH = 200


def write_compact(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically.

    Raises:
        ValueError: a value is infinite or NaN.
    """
    with atomic_write(path) as part:
        # with the keys as strings
        same = json.loads(json.dumps(content, allow_nan=False))
        part.write_text(to_text(same) + "\n", encoding="utf-8")


def to_text(value: Any, indent: int = 0) -> str:
    """Format a value of JSON: on one line if that has at most `WIDTH` characters."""
    line = json.dumps(value)
    if not isinstance(value, dict | list) or len(line) + indent <= WIDTH:
        return line
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    parts = (
        [f"{json.dumps(key)}: {to_text(part, indent + 1)}" for key, part in value.items()]
        if isinstance(value, dict)
        else [to_text(part, indent + 1) for part in value]
    )
    pad = "\n" + " " * (indent + 1)
    return f"{opening}{pad}{f',{pad}'.join(parts)}\n{' ' * indent}{closing}"
