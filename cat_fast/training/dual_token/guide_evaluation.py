"""Evaluation of a guide on held-out images during its run, and the sheet of guides."""

import time
from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from cat_fast.data.images.contact_sheet import Cell, contact_sheet
from cat_fast.data.images.io import image_to_tensor, resize_center_crop, tensor_to_image
from cat_fast.data.images.size import Size
from cat_fast.dual_token.codebook import usage
from cat_fast.dual_token.grid import Grid
from cat_fast.dual_token.guide.model import GuideModel
from cat_fast.evaluation.metrics import mean_colour_psnr, psnr
from cat_fast.training.metrics.held_out_evaluation import SECONDS
from cat_fast.training.metrics.reconstruction_grid import GridImages

_MAX_CELL = 256


class GuideEvaluation:
    """Guides of the same images at every grid.

    Args:
        images: held-out images, or training images if a run has none; their centre crops are kept.
        size: size of the crops, in pixels.
        batch_size: images per forward pass.
    """

    def __init__(
        self,
        images: GridImages,
        size: Size,
        grids: Sequence[Grid],
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.images = torch.stack([image_to_tensor(resize_center_crop(one, size)) for one in images.images])
        self.split = "held_out" if images.held_out else "training"
        self.grids, self.batch_size, self.device = list(dict.fromkeys(grids)), batch_size, device

    @torch.no_grad()
    def evaluate(self, model: GuideModel) -> dict[str, float]:
        """Return metrics by name, and the seconds they took.

        For each grid, the mean PSNR in dB to the resized image and its gain over the mean colour; over all
        grids, the share of codes used and their perplexity.
        """
        started = time.perf_counter()
        found: dict[str, float] = {}
        counts = torch.zeros(model.codebook_size, dtype=torch.int64)
        for grid in self.grids:
            values, gains = [], []
            for batch in self.images.split(self.batch_size):
                x = batch.to(self.device)
                codes = model.encode(model.resize_input(x, grid))
                counts += torch.bincount(codes.flatten().cpu(), minlength=model.codebook_size)
                target = model.resize_target(x, grid)
                guide = model.decode(codes).float().nan_to_num(0.0).clamp(-1, 1)
                values.append(psnr(guide, target))
                gains.append(values[-1] - mean_colour_psnr(target))
            name = f"{model.guide_size(grid)[0]}px"
            found[f"{self.split}/psnr_{name}"] = torch.cat(values).mean().item()
            found[f"{self.split}/gain_over_mean_colour_{name}"] = torch.cat(gains).mean().item()
        used = usage(counts)
        return found | {
            f"{self.split}/codes_used": used.share,
            f"{self.split}/perplexity": used.perplexity,
            SECONDS: round(time.perf_counter() - started, 4),
        }

    @torch.no_grad()
    def draw(
        self, model: GuideModel, title: str, columns: int | None = None
    ) -> tuple[Image.Image, dict[str, float]]:
        """Return a sheet with the originals, and below them their guides, one row per grid."""
        shown = self.images[:columns]
        rows, labels = [_cells(shown)], [["original"]]
        for grid in self.grids:
            codes = torch.cat(
                [model.encode(model.resize_input(x[None].to(self.device), grid)) for x in shown]
            )
            guides = model.decode(codes).float().nan_to_num(0.0).clamp(-1, 1).cpu()
            enlarged = torch.nn.functional.interpolate(guides, size=shown.shape[-2:], mode="bicubic")
            rows.append(_cells(enlarged.clamp(-1, 1)))
            height, width = model.guide_size(grid)
            labels.append([f"{width} x {height} px", f"{grid[0] * grid[1]} tokens"])
        title = f"{title}, {self.split.replace('_', '-')} images"
        return contact_sheet(rows, title=title, labels=labels, max_cell=_MAX_CELL), {}


def _cells(images: Tensor) -> list[Cell]:
    return [Cell(partial(tensor_to_image, image)) for image in images]
