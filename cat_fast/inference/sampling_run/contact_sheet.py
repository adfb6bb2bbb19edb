"""Pictures side by side, each over a line that says what it is and one that says what it cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_GAP, _LINE, _LEAST_CELL, _MOST_CELL = 8, 18, 128, 256
_INK, _FAINT = "#111827", "#6b7280"


@dataclass(frozen=True)
class Cell:
    """A picture file and the two lines below it."""

    picture: Path
    title: str
    note: str


def contact_sheet(cells: Sequence[Cell], columns: int | None = None) -> Image.Image:
    """A sheet on white, row by row; as square as it can be unless `columns` are given.

    Pictures below 128 px are shown larger, pixel by pixel, those above 256 px smaller.
    """
    columns = columns or math.ceil(math.sqrt(len(cells)))
    rows = -(-len(cells) // columns)
    with Image.open(cells[0].picture) as first:
        side = first.width
    cell = min(_MOST_CELL, side * max(1, -(-_LEAST_CELL // side)))
    font = ImageFont.load_default(13)
    step_x, step_y = cell + _GAP, cell + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (_GAP + columns * step_x, _GAP + rows * step_y), "white")
    ink = ImageDraw.Draw(sheet)
    for number, one in enumerate(cells):
        left, top = _GAP + number % columns * step_x, _GAP + number // columns * step_y
        with Image.open(one.picture) as image:
            kind = Image.Resampling.NEAREST if cell > side else Image.Resampling.LANCZOS
            sheet.paste(image.convert("RGB").resize((cell, cell), kind), (left, top))
        ink.text((left, top + cell + 3), _cut(one.title, cell, ink, font), _INK, font)
        ink.text((left, top + cell + 3 + _LINE), _cut(one.note, cell, ink, font), _FAINT, font)
    return sheet


def _cut(
    text: str, width: int, ink: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> str:
    """As much of `text` as goes into `width` pixels."""
    if ink.textlength(text, font) <= width:
        return text
    while text and ink.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
