"""Grids of reconstructions: the same few images at every ratio, in the course of a run.

Nothing here draws a random number: a run with grids is to the bit the run without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from cat_fast.data.images.contact_sheet import Cell, contact_sheet
from cat_fast.data.images.io import image_to_tensor, resize_center_crop, tensor_to_image
from cat_fast.evaluation.metrics import psnr
from cat_fast.training.metrics.flops import token_count

_MAX_CELL = 512


@dataclass(frozen=True)
class GridImages:
    """The images that a run's grids show."""

    images: Sequence[Image.Image]
    held_out: bool
    """False if the run trains on them, as it has no others."""


class ReconstructionGrid:
    """Centre squares of a few images, `size` px a side, kept on `device`."""

    def __init__(self, shown: GridImages, size: int, device: torch.device) -> None:
        squares = [image_to_tensor(resize_center_crop(image, size)) for image in shown.images]
        self.squares = torch.stack(squares).to(device)
        self.held_out = shown.held_out

    @torch.no_grad()
    def draw(
        self, reconstruct: Callable[[Tensor, int], Tensor], ratios: Sequence[int], title: str
    ) -> tuple[Image.Image, dict[str, float]]:
        """Return the grid, a row per ratio below the originals, and the mean PSNR at each ratio in dB.

        Title and names of figures name the split of the images: held-out or training.

        Args:
            reconstruct: (1, 3, size, size) in [-1, 1] and a ratio -> the same image as it comes back. One
                at a time: a grid shall not need more memory than a step.
        """
        size = self.squares.shape[-1]
        split = "held_out" if self.held_out else "training"
        rows, labels, figures = [self.squares], [["original"]], {}
        for ratio in ratios:
            back = torch.cat([reconstruct(image[None], ratio).float() for image in self.squares])
            back = back.nan_to_num(0.0).clamp(-1, 1)  # a diverged model is to be seen
            decibels = psnr(back, self.squares).mean().item()
            figures[f"{split}/psnr_{ratio}x"] = decibels
            tokens = token_count(ratio, size)
            rows.append(back)
            labels.append([f"{ratio}x", f"{tokens:g} token{'s' * (tokens != 1)}", f"{decibels:.1f} dB"])
        cells = [[Cell(partial(tensor_to_image, image)) for image in row] for row in rows]
        title = f"{title}, {split.replace('_', '-')} images"
        return contact_sheet(cells, title=title, labels=labels, max_cell=_MAX_CELL), figures
