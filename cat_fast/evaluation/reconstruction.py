"""Reconstruction quality of a tokenizer, per image at every ratio and at the ratio chosen for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_fast.complexity import tokens_per_image
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop
from cat_fast.evaluation.metrics import mean_colour_psnr, psnr
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.perceptual import STLPIPS


@dataclass(frozen=True, kw_only=True)
class RatioResult:
    """Reconstruction of one image at one ratio."""

    image: Tensor
    """(3, H, W) in [-1, 1]."""
    tokens: int
    psnr: float
    perceptual: float


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Reconstructions of one image at all ratios."""

    record: ImageRecord
    original: Tensor
    """(3, H, W) in [-1, 1]."""
    mean_colour_psnr: float
    at: dict[int, RatioResult]

    @property
    def chosen(self) -> RatioResult:
        return self.at[self.record.ratio]


@torch.no_grad()
def reconstruct(
    tokenizer: NestedAutoencoderKL,
    records: Sequence[ImageRecord],
    size: int,
    on_done: Callable[[], None] = lambda: None,
) -> list[Reconstruction]:
    """Reconstruct images at every ratio, from the mode of the posterior.

    Args:
        size: side in pixels to which the centre squares of the images are scaled.
        on_done: called after each image.
    """
    tokenizer.eval()
    distance = STLPIPS.pretrained()
    results = []
    for record in records:
        original = image_to_tensor(resize_center_crop(load_image(record.path), size))[None]
        decoded = torch.cat([_reconstruct(tokenizer, original, ratio) for ratio in tokenizer.ratios])
        figures = zip(
            tokenizer.ratios,
            decoded,
            psnr(decoded, original).tolist(),
            distance(decoded, original).tolist(),
            strict=True,
        )
        at = {
            ratio: RatioResult(
                image=image, tokens=tokens_per_image(ratio, size), psnr=decibels, perceptual=far
            )
            for ratio, image, decibels, far in figures
        }
        results.append(
            Reconstruction(
                record=record, original=original[0], mean_colour_psnr=mean_colour_psnr(original).item(), at=at
            )
        )
        on_done()
    return results


def _reconstruct(tokenizer: NestedAutoencoderKL, images: Tensor, ratio: int) -> Tensor:
    return tokenizer(images, ratio).sample.clamp(-1, 1)


def summarize(results: Sequence[Reconstruction]) -> dict:
    """Return means over images as JSON values, per ratio and at the ratio chosen for each image."""
    n = len(results)
    fixed = sum(r.at[16].tokens for r in results) if 16 in results[0].at else None
    spent = sum(r.chosen.tokens for r in results)
    return {
        "images": n,
        "mean_colour_psnr": sum(r.mean_colour_psnr for r in results) / n,
        "chosen": {
            "psnr": sum(r.chosen.psnr for r in results) / n,
            "perceptual": sum(r.chosen.perceptual for r in results) / n,
            "tokens": spent / n,
            "tokens_vs_fixed_16x": spent / fixed if fixed else None,
        },
        "per_ratio": {
            str(ratio): {
                "psnr": sum(r.at[ratio].psnr for r in results) / n,
                "perceptual": sum(r.at[ratio].perceptual for r in results) / n,
                "tokens": sum(r.at[ratio].tokens for r in results) / n,
            }
            for ratio in results[0].at
        },
    }
