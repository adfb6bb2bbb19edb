"""Sizes of images in pixels: the side of a square, or height and width. Does not import torch."""

from collections.abc import Sequence
from typing import Any

Size = int | Sequence[int]
"""Side of a square, or (height, width)."""


def height_and_width(size: Size) -> tuple[int, int]:
    """Return a size as (height, width).

    Raises:
        ValueError: not a positive integer or two of them.
    """
    sides: list[Any] = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or any(type(side) is not int for side in sides):
        raise ValueError(f"expected a side in pixels, or [height, width] such as [48, 96], got {size!r}")
    if min(sides) <= 0:
        raise ValueError(f"{size!r} must be positive")
    return sides[0], sides[1]


def format_size(size: Size) -> str:
    """Return `48 × 96 pixels`."""
    height, width = height_and_width(size)
    return f"{height} × {width} pixels"
