"""Random crops. Does not import torch, so that decoder processes start quickly."""

import numpy as np
from PIL import Image

from cat_fast.data.images.size import Size, height_and_width


def random_crop(
    image: Image.Image, rng: np.random.Generator, image_size: Size, min_crop: float, allow_flip: bool
) -> Image.Image:
    """Return a random crop with the aspect ratio of `image_size`, scaled to that size.

    Args:
        image_size: size of the crop in pixels.
        min_crop: smallest crop as a share of the largest one with this aspect ratio, per side. The crop has
            at least `image_size` pixels per side, unless the image is smaller.
        allow_flip: flip half of the crops horizontally.
    """
    height, width = height_and_width(image_size)
    short = min(height, width)
    largest = min(image.height * short / height, image.width * short / width)  # short side of a crop
    side = min(largest, max(short, round(largest * rng.uniform(min_crop, 1.0))))
    crop_height = min(image.height, max(1, round(side * height / short)))
    crop_width = min(image.width, max(1, round(side * width / short)))
    left = int(rng.integers(image.width - crop_width + 1))
    top = int(rng.integers(image.height - crop_height + 1))
    box = (left, top, left + crop_width, top + crop_height)
    crop = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if allow_flip and rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop


def shrink(image: Image.Image, max_side: int) -> Image.Image:
    """Return the image, downscaled if its short side exceeds `max_side` pixels."""
    scale = max_side / min(image.size)
    if scale >= 1:
        return image
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def jitter_colours(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Randomly permute, scale and shift the channels of a (3, H, W) float32 image in [-1, 1].

    Scales are in [1 - strength, 1], shifts in [-strength, strength].
    """
    gain = np.float32(1) - np.float32(strength) * rng.random((3, 1, 1), dtype=np.float32)
    shift = np.float32(strength) * (np.float32(2) * rng.random((3, 1, 1), dtype=np.float32) - np.float32(1))
    return (pixels[rng.permutation(3)] * gain + shift).clip(-1, 1)
