"""Grids of reconstructions: the same few pictures at every ratio, in the course of a run.

Nothing here draws a random number: a run with grids is to the bit the run without.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cat_fast.complexity.image_ratios import PHOTOGRAPHS
from cat_fast.data.images.io import (
    find_images,
    image_to_tensor,
    load_image,
    resize_center_crop,
    tensor_to_image,
)
from cat_fast.data.photographs import CATEGORIES, photographs
from cat_fast.evaluation.metrics import psnr
from cat_fast.training.config.settings import LoggingConfig
from cat_fast.training.metrics.flops import token_count

_MARGIN, _GAP, _GUTTER, _HEADER = 16, 4, 112, 44
_LEAST_CELL, _MOST_CELL = 128, 512
_INK, _FAINT, _EDGE = "#111827", "#6b7280", "#e5e7eb"


class ReconstructionGrid:
    """Centre squares of a few pictures, `size` px a side, kept on `device`."""

    def __init__(self, config: LoggingConfig, size: int, device: torch.device) -> None:
        paths = _paths(config.grid_pictures, config.grid_columns)
        squares = [image_to_tensor(resize_center_crop(load_image(path), size)) for path in paths]
        self.pictures = torch.stack(squares).to(device)

    @torch.no_grad()
    def draw(
        self, reconstruct: Callable[[Tensor, int], Tensor], ratios: Sequence[int], title: str
    ) -> tuple[Image.Image, dict[str, float]]:
        """The grid, a row a ratio below the originals, and the mean PSNR at each ratio in dB.

        Args:
            reconstruct: (1, 3, size, size) in [-1, 1] and a ratio -> the same picture as it comes back. One
                at a time: a grid shall not need more memory than a step.
        """
        size = self.pictures.shape[-1]
        rows, figures = [("original", "", "", self.pictures)], {}
        for ratio in ratios:
            back = torch.cat([reconstruct(picture[None], ratio).float() for picture in self.pictures])
            back = back.nan_to_num(0.0).clamp(-1, 1)  # a diverged model is to be seen
            decibels = psnr(back, self.pictures).mean().item()
            figures[f"held_out/psnr_{ratio}x"] = decibels
            tokens = token_count(ratio, size)
            rows.append((f"{ratio}x", f"{tokens:g} token{'s' * (tokens != 1)}", f"{decibels:.1f} dB", back))
        return _compose(rows, title), figures


def _compose(rows: Sequence[tuple[str, str, str, Tensor]], title: str) -> Image.Image:
    columns, side = len(rows[0][3]), rows[0][3].shape[-1]
    # Small pictures are shown larger, pixel by pixel.
    cell = min(_MOST_CELL, side * max(1, -(-_LEAST_CELL // side)))
    width = _MARGIN + _GUTTER + columns * (cell + _GAP) - _GAP + _MARGIN
    height = _HEADER + len(rows) * (cell + _GAP) - _GAP + _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    ink = ImageDraw.Draw(sheet)
    ink.text((_MARGIN, _HEADER / 2), title, _INK, _font(16), anchor="lm")
    for row, (name, tokens, decibels, pictures) in enumerate(rows):
        top = _HEADER + row * (cell + _GAP)
        middle = top + cell / 2
        ink.text((_MARGIN, middle - (22 if tokens else 0)), name, _INK, _font(20), anchor="lm")
        ink.text((_MARGIN, middle + 4), tokens, _FAINT, _font(14), anchor="lm")
        ink.text((_MARGIN, middle + 24), decibels, _FAINT, _font(14), anchor="lm")
        for column, picture in enumerate(pictures):
            image = tensor_to_image(picture).resize((cell, cell), _resampling(side, cell))
            left = _MARGIN + _GUTTER + column * (cell + _GAP)
            sheet.paste(image, (left, top))
            ink.rectangle((left - 1, top - 1, left + cell, top + cell), outline=_EDGE)
    return sheet


def _resampling(side: int, cell: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if cell >= side else Image.Resampling.LANCZOS


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _paths(pictures: str, count: int) -> list[Path]:
    """The pictures to show: of the held-out photographs first one of each category, then the others."""
    if pictures != PHOTOGRAPHS:
        return find_images([pictures])[:count]
    by_category = [[p for p in photographs("held_out") if p.category == c] for c in CATEGORIES]
    in_turn = [p for round_ in zip_longest(*by_category) for p in round_ if p is not None]
    return [photograph.path for photograph in in_turn[:count]]
