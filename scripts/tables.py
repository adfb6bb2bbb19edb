"""Tables in documents: each stands between `<!-- NAME -->` and `<!-- end -->`, and is made from results."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def fill(text: str, tables: Mapping[str, str]) -> str:
    """The document `text` with its tables, by name, replaced.

    Raises:
        ValueError: a table that has no place in the document, or several.
    """
    for name, table in tables.items():
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda m, t=table: m[1] + t + m[2],
            text,
            flags=re.DOTALL,
        )
        if found != 1:
            raise ValueError(f"the document has {found} places for the table {name!r}, not one")
    return text


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def results(name: str) -> Any:
    """What a benchmark wrote: benchmarks/results/NAME.json."""
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
