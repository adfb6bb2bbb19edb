"""Grids of guide codes: (height, width) in tokens. Does not import torch."""

import re
from typing import Any

from cat_fast.errors import UserError

Grid = tuple[int, int]
"""Height and width in tokens."""
SIDES = (2, 4, 8, 16)
"""Sides of the square grids of the paper: 4, 16, 64 and 256 tokens."""


def as_grid(value: Any, setting: str = "grid") -> Grid:
    """Return a grid from a side or (height, width).

    Raises:
        UserError: not a positive integer or two of them; the message names `setting`.
    """
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise UserError(
            f"{setting}: expected a number of tokens per side, such as 8, or height and width, such as"
            f" [20, 17], got {value!r}"
        )
    return sides[0], sides[1]


def parse_grid(text: str, setting: str = "--grid") -> Grid:
    """Parse `8` or `20x17` (height x width).

    Raises:
        UserError: another text.
    """
    return as_grid(parse_sides(text, setting, "tokens", "8", "20x17"), setting)


def parse_sides(text: str, setting: str, unit: str, one: str, two: str) -> tuple[int, int]:
    """Parse a side or HEIGHTxWIDTH.

    Args:
        unit: of the sides, for messages.
        one, two: examples, for messages.

    Raises:
        UserError: another text.
    """
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text.strip())
    if found is None:
        raise UserError(
            f"{setting} {text}: expected {unit} per side, such as {one}, or HEIGHTxWIDTH, such as {two}"
        )
    height = int(found[1])
    return height, int(found[2]) if found[2] else height


def format_grid(grid: Grid) -> str:
    """Format a grid, such as `20 x 17 tokens`."""
    return f"{grid[0]} x {grid[1]} tokens"
