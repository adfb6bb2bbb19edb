"""Decoding of image files to training crops, in workers. Does not import torch, so that they start fast."""

import hashlib
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

from cat_fast.data.images.io import decode_image
from cat_fast.data.images.random_crop import jitter_colours, random_crop, shrink
from cat_fast.data.images.size import Size
from cat_fast.data.streams.shared_slots import Slot


class CropSettings(NamedTuple):
    """Settings of training crops."""

    image_size: Size
    """Size of a crop in pixels."""
    min_crop: float
    """Smallest crop as a share per side of the largest one, before resizing to `image_size`; at least
    `image_size` pixels, unless the image is smaller."""
    colour_jitter: float = 0.0
    """Strength in [0, 1) of random colour changes, for data sets too small to cover all colours: channels are
    permuted, and each is scaled by 1 - jitter to 1 and shifted by at most jitter."""
    max_side: int = 0
    """Images with a larger short side are first downscaled to this many pixels; 0 disables it."""
    flips: bool = True
    """Flip random crops of images without text. False for captioned images: a caption may name sides."""


class Crop(NamedTuple):
    """A training crop."""

    pixels: np.ndarray
    """(3, H, W) of the crop's size: uint8, or float32 in [-1, 1] if the colours were changed."""
    seconds: float
    """Time to decode and crop it."""


class SharedCrop(NamedTuple):
    """A crop whose pixels are in a slot of shared memory."""

    shape: tuple[int, ...]
    dtype: str
    seconds: float
    """Time to decode and crop it."""


def crop_seed(seed: int, epoch: int, ratio: int, key: str) -> tuple[int, ...]:
    """Return the seed of an image's crop, flip and colours.

    It depends on the image, not on its index in a batch: a broken image shifts the following ones, which
    other workers are already cropping.
    """
    # File names may contain any bytes; Python represents invalid ones as lone surrogates.
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return seed, epoch, ratio, int.from_bytes(digest, "little"), 5


def decode_crop(data: bytes, seed: tuple[int, ...], allow_flip: bool, settings: CropSettings) -> Crop:
    """Return a random crop of an encoded image.

    Raises:
        UserError: the bytes are not a complete image.
    """
    start = time.perf_counter()
    pixels = crop_pixels(decode(data, settings), np.random.default_rng(seed), allow_flip, settings)
    return Crop(pixels, time.perf_counter() - start)


def decode_crop_into(
    slot: Slot, data: bytes | int, seed: tuple[int, ...], allow_flip: bool, settings: CropSettings
) -> SharedCrop | None:
    """Write the result of `decode_crop` to a slot. None if this process cannot map it.

    Args:
        data: encoded image, or its number of bytes if it is in the slot. The crop overwrites it.

    Raises:
        UserError: the bytes are not a complete image.
    """
    memory = slot.array()
    if memory is None:
        return None
    encoded = memory[:data].tobytes() if isinstance(data, int) else data
    pixels, seconds = decode_crop(encoded, seed, allow_flip, settings)
    memory[: pixels.nbytes] = pixels.view(np.uint8).ravel()
    return SharedCrop(pixels.shape, pixels.dtype.str, seconds)


def decode(data: bytes, settings: CropSettings) -> Image.Image:
    """Return an encoded image as 8-bit RGB, downscaled to `settings.max_side`.

    Raises:
        UserError: the bytes are not a complete image.
    """
    image = decode_image(data)
    return shrink(image, settings.max_side) if settings.max_side else image


def crop_pixels(
    image: Image.Image, rng: np.random.Generator, allow_flip: bool, settings: CropSettings
) -> np.ndarray:
    """Return a random crop, randomly flipped if both arguments allow it, in the format of `Crop.pixels`."""
    allow_flip = allow_flip and settings.flips
    crop = random_crop(image, rng, settings.image_size, settings.min_crop, allow_flip)
    pixels = np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1))
    if settings.colour_jitter:
        return jitter_colours(pixels.astype(np.float32) / 127.5 - 1, settings.colour_jitter, rng)
    return pixels
