"""Tables in documents, generated from results, between `<!-- NAME -->` and `<!-- end -->`."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared.committed import committed

ROOT = Path(__file__).parents[2]


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Replace the tables of a document by name.

    Raises:
        ValueError: the document has no place for a table, or several.
    """
    for name, table in tables.items():
        literal = table.replace("\\", r"\\")
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            rf"\g<1>{literal}\g<2>",
            text,
            flags=re.DOTALL,
        )
        if found != 1:
            raise ValueError(f"expected one place for the table {name!r} in the document, found {found}")
    return text


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def results(name: str) -> Any:
    """Load the newest committed results of a benchmark."""
    return json.loads(committed(name).read_text(encoding="utf-8"))
