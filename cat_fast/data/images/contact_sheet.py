"""Contact sheet: images of one size in rows, with a title, row labels and notes below the images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP = 8
"""Pixels between cells and around the sheet."""
HEADER, GUTTER, LINE = 44, 112, 18
"""Height of the title, least width of the row labels, height of a line of notes, in pixels."""
MIN_CELL = 128
_INK, _FAINT = "#111827", "#6b7280"
_LABEL_OFFSETS = (-22, 4, 24)
"""Vertical offsets of a label's lines from the middle of its row, in pixels."""
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Cell:
    """An image, opened when it is drawn, and the lines below it."""

    open: Callable[[], Image.Image]
    notes: Sequence[str] = ()


def contact_sheet(
    rows: Sequence[Sequence[Cell]],
    *,
    title: str = "",
    labels: Sequence[Sequence[str]] = (),
    max_cell: int = 256,
) -> Image.Image:
    """Draw the cells of each row from left to right.

    Images below 128 px are enlarged by nearest neighbour, those above `max_cell` px downscaled. One image is
    open at a time.

    Args:
        rows: cells per row; no row may be longer than the first.
        labels: up to three lines per row, drawn to its left.
    """
    with rows[0][0].open() as first:
        side = max(first.size)
        longest = min(max_cell, side * max(1, -(-MIN_CELL // side)))
        cell_x, cell_y = (max(1, round(length * longest / side)) for length in first.size)
    resampling = Image.Resampling.NEAREST if longest >= side else Image.Resampling.BICUBIC
    notes = max(len(one.notes) for row in rows for one in row)
    left, top = GAP + _label_width(labels), HEADER if title else GAP
    step_x, step_y = cell_x + GAP, cell_y + notes * LINE + GAP
    sheet = Image.new("RGB", (left + len(rows[0]) * step_x, top + len(rows) * step_y), "white")
    ink = ImageDraw.Draw(sheet)
    ink.text((GAP, HEADER / 2), title, _INK, _font(16), anchor="lm")
    for y, row in zip(range(top, sheet.height, step_y), rows, strict=False):
        for x, one in zip(range(left, sheet.width, step_x), row, strict=False):
            with one.open() as image:
                sheet.paste(image.convert("RGB").resize((cell_x, cell_y), resampling), (x, y))
            for number, note in enumerate(one.notes):
                place = (x, y + cell_y + 3 + number * LINE)
                ink.text(place, _cut(note, cell_x, ink, _font(13)), _FAINT if number else _INK, _font(13))
    for number, lines in enumerate(labels):
        middle = top + number * step_y + cell_y / 2
        offsets = _LABEL_OFFSETS if len(lines) > 1 else (0,)
        for line, (offset, text) in enumerate(zip(offsets, lines, strict=False)):
            ink.text((GAP, middle + offset), text, _FAINT if line else _INK, _label_font(line), anchor="lm")
    return sheet


def _label_width(labels: Sequence[Sequence[str]]) -> int:
    """Return the width of the column of row labels with the space after it; 0 without labels."""
    widths = [_label_font(line).getlength(text) for lines in labels for line, text in enumerate(lines[:3])]
    return max(GUTTER, math.ceil(max(widths, default=0)) + GAP) if labels else 0


def _label_font(line: int) -> Font:
    return _font(14 if line else 20)


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _cut(text: str, width: int, ink: ImageDraw.ImageDraw, font: Font) -> str:
    """Return `text`, truncated to `width` pixels."""
    if ink.textlength(text, font) <= width:
        return text
    while text and ink.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
