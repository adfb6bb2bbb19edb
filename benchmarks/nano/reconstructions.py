"""Reconstructions of held-out photographs, emoji and pages by a tokenizer, next to the ideal low-pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.nano.intervals import mean_with_interval
from benchmarks.nano.low_pass import low_pass
from benchmarks.nano.pages import MIN_CHARACTERS, READABLE, character_error_rate, read_text
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop, tensor_to_image
from cat_fast.evaluation.metrics import psnr
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.perceptual import STLPIPS

Progress = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """Figures of one image at the ratios of one tokenizer."""

    key: str
    psnr: dict[int, float] = field(default_factory=dict)
    low_pass: dict[int, float] = field(default_factory=dict)
    st_lpips: dict[int, float] = field(default_factory=dict)
    error_rate: dict[int, float] = field(default_factory=dict)
    """Character error rate against the text of the original; pages only."""


@torch.no_grad()
def reconstruct_all(
    tokenizer: NestedAutoencoderKL,
    records: Sequence[ImageRecord],
    side: int,
    *,
    texts: Mapping[str, str] | None = None,
    progress: Progress = lambda: None,
) -> list[Reconstructed]:
    """Reconstruct the centre squares of images at every ratio of a tokenizer, from the posterior's mode.

    Args:
        side: side of the squares in pixels.
        texts: text of the originals by key, to measure error rates of.
        progress: called after each image.
    """
    distance, channels = STLPIPS.pretrained(), tokenizer.config["latent_channels"]
    results = []
    for record in records:
        image = resize_center_crop(load_image(record.path), side)
        original = image_to_tensor(image)[None]
        result = Reconstructed(key=record.key)
        for ratio in tokenizer.ratios:
            latent = tokenizer.encode(original, ratio).latent_dist.mode()
            decoded = tokenizer.decode(latent, ratio).sample.clamp(-1, 1)
            result.psnr[ratio] = float(psnr(decoded, original))
            result.low_pass[ratio] = float(psnr(_low_passed(original, ratio, channels), original))
            result.st_lpips[ratio] = float(distance(decoded, original))
            if texts is not None:
                text = read_text(tensor_to_image(decoded[0]))
                result.error_rate[ratio] = character_error_rate(text, texts[record.key])
        results.append(result)
        progress()
    return results


def readable_pages(
    records: Sequence[ImageRecord], side: int, wanted: int, progress: Progress = lambda: None
) -> dict[str, str]:
    """Return the text of the first `wanted` legible pages, by key.

    The text is tesseract's reading of the original. A page counts as legible if the reading at one of two
    other enlargements differs in less than 5 % of its characters.
    """
    found: dict[str, str] = {}
    for record in records:
        if len(found) == wanted:
            break
        image = resize_center_crop(load_image(record.path), side)
        text = read_text(image)
        if len(text) >= MIN_CHARACTERS and any(
            character_error_rate(read_text(image, scale), text) < READABLE for scale in (3, 4)
        ):
            found[record.key] = text
            progress()
    return found


def summarize(results: Sequence[Reconstructed]) -> dict[str, Any]:
    """Return means with intervals per ratio, and the median error rate of pages."""
    summary: dict[str, Any] = {}
    for ratio in results[0].psnr:
        figures = {
            name: mean_with_interval([getattr(result, name)[ratio] for result in results])
            for name in ("psnr", "low_pass", "st_lpips")
        }
        if results[0].error_rate:
            rates = [result.error_rate[ratio] for result in results]
            figures["error_rate"] = mean_with_interval(rates) | {"median": median(rates)}
        summary[f"{ratio}x"] = figures
    return summary


def _low_passed(image: Tensor, ratio: int, channels: int) -> Tensor:
    pixels = (image[0].permute(1, 2, 0).numpy() + 1) / 2
    return torch.from_numpy(low_pass(pixels, ratio, channels)).permute(2, 0, 1)[None].float() * 2 - 1
