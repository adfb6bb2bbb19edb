"""One random square crop of an image. Free of torch, so that processes that only decode start in no time."""

import numpy as np
from PIL import Image


def random_crop(
    image: Image.Image, rng: np.random.Generator, image_size: int, min_crop: float, mirrored: bool
) -> Image.Image:
    """A square of at least `min_crop` of the short side, scaled to `image_size` x `image_size` pixels.

    It never has fewer pixels than that, unless the image itself is smaller; `mirrored` lets chance flip it
    left to right.
    """
    short = min(image.size)
    side = min(short, max(image_size, round(short * rng.uniform(min_crop, 1.0))))
    left = int(rng.integers(image.width - side + 1))
    top = int(rng.integers(image.height - side + 1))
    crop = image.resize(
        (image_size, image_size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    if mirrored and rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop


def shrink(image: Image.Image, max_side: int) -> Image.Image:
    """Return an image with its short side at most `max_side` pixels."""
    scale = max_side / min(image.size)
    if scale >= 1:
        return image
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def jitter_colours(x_CHW: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """(3, H, W) float32 in [-1, 1], channels in another order, scaled by 1 - strength to 1, shifted."""
    gain = np.float32(1) - np.float32(strength) * rng.random((3, 1, 1), dtype=np.float32)
    shift = np.float32(strength) * (np.float32(2) * rng.random((3, 1, 1), dtype=np.float32) - np.float32(1))
    return (x_CHW[rng.permutation(3)] * gain + shift).clip(-1, 1)
