"""Contact sheet: images of one size in rows, with a title, row labels and notes below the images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP = 8
"""Pixels between cells and around the sheet."""
HEADER, GUTTER, LINE = 44, 112, 18
"""Height of the title, width of the row labels, height of a line of notes, in pixels."""
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
    resampling = Image.Resampling.NEAREST if longest >= side else Image.Resampling.LANCZOS
    notes = max(len(one.notes) for row in rows for one in row)
    left, top = GAP + GUTTER * bool(labels), HEADER if title else GAP
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
            font, colour = (_font(14), _FAINT) if line else (_font(20), _INK)
            ink.text((GAP, middle + offset), text, colour, font, anchor="lm")
    return sheet


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _cut(text: str, width: int, ink: ImageDraw.ImageDraw, font: Font) -> str:
    """Return `text`, truncated to `width` pixels."""
    if ink.textlength(text, font) <= width:
        return text
    while text and ink.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
