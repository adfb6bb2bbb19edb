"""Features of images for a linear head: latents, or pixels of equal width as a baseline."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cat_fast.complexity.ratios.policy import ratio_of_image
from cat_fast.data.images.io import image_to_bytes, resize_center_crop
from cat_fast.errors import UserError
from cat_fast.evaluation.classification.arrays import ArrayWriter, writing
from cat_fast.evaluation.classification.sets import Labelled, LabelledSet
from cat_fast.evaluation.tokenizers.columns import Column, Scored
from cat_fast.evaluation.tokenizers.samples import read_scores
from cat_fast.tokenizer import NestedAutoencoderKL


def features_of(latents: Tensor, width: int, pooled: bool) -> Tensor:
    """Return features (B, width) of latents (B, c, h, w): flattened and padded with zeros, or their means."""
    if pooled:
        return latents.mean((2, 3))
    flat = latents.flatten(1)
    return F.pad(flat, (0, width - flat.shape[1]))


def pixel_features(images: Tensor, width: int) -> Tensor:
    """Return features (B, width) of images (B, 3, H, W) in [-1, 1]: the pixels of a thumbnail."""
    side = math.isqrt(width // 3)
    small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return F.pad(small.flatten(1), (0, width - 3 * side**2))


def randomly_initialised(model: NestedAutoencoderKL, seed: int = 0) -> NestedAutoencoderKL:
    """Return an untrained model of the same shape, with torch's default initialisation."""
    arguments = {name: value for name, value in model.config.items() if not name.startswith("_")}
    torch.manual_seed(seed)
    made = type(model)(**arguments | {"initialisation": "default"})
    return made.to(model.device, model.dtype).eval()


def encoder_of(model: NestedAutoencoderKL) -> Callable[[Tensor, int], Tensor]:
    """Return the function from images (B, 3, H, W) in [-1, 1] and a ratio to the model's latents."""

    @torch.no_grad()
    def encode(images: Tensor, ratio: int) -> Tensor:
        return model.encode(images.to(model.device, model.dtype), ratio).latent_dist.mode()

    return encode


class Choices:
    """Ratio of each image by a column's rule and the scores in a file.

    Args:
        scores: file of scores by key; None takes those of the labels.
    """

    def __init__(self, column: Column, size: int, scores: Path | None) -> None:
        if column.rule.startswith("budget="):
            raise UserError(
                "classification: a budget needs all images at once; use adaptive or a fixed ratio"
            )
        self.column, self.size = column, size
        self.scores = read_scores(scores) if scores else {}

    def of(self, image: Labelled) -> int | str:
        """Return the ratio of a readable image, or the reason why it has none."""
        if isinstance(image.image, str):
            return image.image
        if self.column.rule == "jpeg":
            return ratio_of_image(image.image)
        key = image.scored.key
        score, expected = (
            self.scores.get(key)
            or self.scores.get(Path(key).stem)
            or (image.scored.score, image.scored.expected)
        )
        if score is None and self.column.needs_scores:
            return "no score, which adaptive ratios need"
        (choice,) = self.column.choose([Scored(key, score, expected)], self.size)
        assert choice is not None
        return choice


def write_features(
    folder: Path,
    images: LabelledSet,
    classes: Sequence[str],
    choices: Choices,
    encode: Callable[[Tensor, int], Tensor],
    width: int,
    source: dict[str, Any],
    batch_size: int = 32,
    pooled_folder: Path | None = None,
    on_images: Callable[[int], None] = lambda count: None,
) -> None:
    """Encode a split and write its features, (N, width), to `folder`.

    Args:
        encode: maps images (B, 3, H, W) in [-1, 1] and a ratio to latents (B, c, h, w), or to features.
        source: identity of images and encoder, for the record.
        pooled_folder: folder for the mean latents of the same images.
    """
    waiting: dict[int, list[tuple[Tensor, int]]] = {}
    count = images.count()

    def write(writers: Sequence[ArrayWriter], widths: Sequence[int]) -> None:
        def flush(ratio: int) -> None:
            batch = waiting.pop(ratio, [])
            if not batch:
                return
            x = torch.stack([pixels for pixels, _ in batch]).float() / 127.5 - 1
            found = encode(x, ratio).float().cpu()
            for writer, size, pooled in zip(writers, widths, (False, True), strict=False):
                rows = found if found.ndim == 2 else features_of(found, size, pooled)
                for row, (_, label) in zip(rows.numpy(), batch, strict=True):
                    writer.add(row, label, ratio)

        for pixels, label, ratio in _usable(images, classes, choices, writers, on_images):
            waiting.setdefault(ratio, []).append((pixels, label))
            if len(waiting[ratio]) == batch_size:
                flush(ratio)
        for ratio in sorted(waiting):
            flush(ratio)

    with writing(folder, count, (width,), np.float32, source) as flat:
        flat.classes = classes
        if pooled_folder is None:
            write([flat], [width])
            return
        channels = width // (choices.size // min(choices.column.tokenizer.choices)) ** 2
        with writing(pooled_folder, count, (channels,), np.float32, source) as pooled:
            pooled.classes = classes
            write([flat, pooled], [width, channels])


def write_images(
    folder: Path,
    images: LabelledSet,
    classes: Sequence[str],
    choices: Choices,
    source: dict[str, Any],
    on_images: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a split's images, (N, 3, size, size) uint8, for fine-tuning."""
    shape = (3, choices.size, choices.size)
    with writing(folder, images.count(), shape, np.uint8, source) as writer:
        writer.classes = classes
        for pixels, label, ratio in _usable(images, classes, choices, [writer], on_images):
            writer.add(pixels.numpy(), label, ratio)


def _usable(
    images: LabelledSet,
    classes: Sequence[str],
    choices: Choices,
    writers: Sequence[ArrayWriter],
    on_images: Callable[[int], None],
) -> Iterator[tuple[Tensor, int, int]]:
    """Yield pixels (3, H, W) uint8, label and ratio of each usable image; record the others."""
    numbers = {name: number for number, name in enumerate(classes)}
    for image in images.read():
        on_images(1)
        ratio = choices.of(image)
        if isinstance(ratio, int) and image.category in numbers and not isinstance(image.image, str):
            pixels = image_to_bytes(resize_center_crop(image.image, choices.size))
            yield pixels, numbers[image.category], ratio
            continue
        why = ratio if isinstance(ratio, str) else f"class {image.category!r} is not in the training set"
        for writer in writers:
            writer.skipped.append({"name": image.scored.key, "why": why})
