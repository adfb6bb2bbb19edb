"""Grids that show reconstructions of the same few images at every ratio during a run.

Drawing a grid uses no random numbers, so a run with grids is bit-identical to one without.
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
    """Images to show in a run's grids."""

    images: Sequence[Image.Image]
    held_out: bool
    """False if they are training images."""


class ReconstructionGrid:
    """Grid of a few images and their reconstructions.

    Args:
        shown: the images; their center squares are kept on `device`.
        size: side of the squares, in pixels.
    """

    def __init__(self, shown: GridImages, size: int, device: torch.device) -> None:
        originals = [image_to_tensor(resize_center_crop(image, size)) for image in shown.images]
        self.originals = torch.stack(originals).to(device)
        self.held_out = shown.held_out

    @torch.no_grad()
    def draw(
        self, reconstruct: Callable[[Tensor, int], Tensor], ratios: Sequence[int], title: str
    ) -> tuple[Image.Image, dict[str, float]]:
        """Return the grid, one row per ratio below the originals, and the mean PSNR at each ratio in dB.

        The title and the metric names contain the split of the images: held-out or training.

        Args:
            reconstruct: maps an image (1, 3, size, size) in [-1, 1] and a ratio to its reconstruction. It is
                called for one image at a time, so that a grid needs no more memory than a training step.
        """
        size = self.originals.shape[-1]
        split = "held_out" if self.held_out else "training"
        rows, labels, figures = [self.originals], [["original"]], {}
        for ratio in ratios:
            back = torch.cat([reconstruct(image[None], ratio).float() for image in self.originals])
            back = back.nan_to_num(0.0).clamp(-1, 1)  # so that a diverged model can be drawn
            decibels = psnr(back, self.originals).mean().item()
            figures[f"{split}/psnr_{ratio}x"] = decibels
            tokens = token_count(ratio, size)
            rows.append(back)
            labels.append([f"{ratio}x", f"{tokens:g} token{'s' * (tokens != 1)}", f"{decibels:.1f} dB"])
        cells = [[Cell(partial(tensor_to_image, image)) for image in row] for row in rows]
        title = f"{title}, {split.replace('_', '-')} images"
        return contact_sheet(cells, title=title, labels=labels, max_cell=_MAX_CELL), figures
