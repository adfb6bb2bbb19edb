"""Figures in the model cards of the shipped nano models, and the tables of the demo."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.nano.tables import tables, to_markdown, twin_tables
from cat_fast.errors import UserError
from cat_fast.weights.shipped import NAMES, SHIPPED, TABLES, TOKENIZER, TRANSFORMER

CARD = "README.md"
_SECTION = re.compile(r"## Figures\n.*?(?=## Limits\n)", re.DOTALL)


def figures_section(found: list[dict[str, Any]]) -> str:
    """Return the section of a card with tables of figures; without tables, how to measure them."""
    texts = [to_markdown(table) for table in found] or ["Not measured yet: `make nano-report`.", ""]
    return "\n".join(["## Figures", "", *texts])


def update_figures(report: dict[str, Any], shipped: Path = SHIPPED) -> None:
    """Replace the figures of all shipped models by those of a report; weights and settings stay.

    Raises:
        UserError: a card is missing, or has no section of figures.
    """
    pipeline, twin = (shipped / name for name in NAMES)
    for folder in (pipeline / TRANSFORMER, pipeline / TOKENIZER):
        _replace(folder / CARD, tables(report))
    _replace(twin / TOKENIZER / CARD, twin_tables(report))
    write_tables(pipeline, report)


def write_tables(folder: Path, report: dict[str, Any]) -> None:
    """Write the tables that the demo shows."""
    text = json.dumps(tables(report), indent=1, ensure_ascii=False)
    (folder / TABLES).write_text(text + "\n", encoding="utf-8")


def _replace(card: Path, found: list[dict[str, Any]]) -> None:
    if not card.is_file():
        raise UserError(f"{card}: no model card; export the model first (python -m benchmarks.nano_export)")
    section = figures_section(found) + "\n"
    text, replaced = _SECTION.subn(lambda _: section, card.read_text(encoding="utf-8"))
    if replaced != 1:
        raise UserError(f"{card}: expected one section Figures before Limits, found {replaced}; export again")
    card.write_text(text, encoding="utf-8")
