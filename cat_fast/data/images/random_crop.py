"""Random square crops. Does not import torch, so that decoder processes start quickly."""

import numpy as np
from PIL import Image


def random_crop(
    image: Image.Image, rng: np.random.Generator, image_size: int, min_crop: float, allow_flip: bool
) -> Image.Image:
    """Return a random square crop, scaled to `image_size` x `image_size` pixels.

    Args:
        min_crop: smallest crop side as a share of the short side. The crop has at least `image_size` pixels
            per side, unless the image is smaller.
        allow_flip: flip half of the crops horizontally.
    """
    short = min(image.size)
    side = min(short, max(image_size, round(short * rng.uniform(min_crop, 1.0))))
    left = int(rng.integers(image.width - side + 1))
    top = int(rng.integers(image.height - side + 1))
    crop = image.resize(
        (image_size, image_size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
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
