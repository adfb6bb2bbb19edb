"""From a file's bytes to a training crop: what a worker does. Free of torch, so that it starts quickly."""

import hashlib
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

from cat_fast.data.images.io import decode_image
from cat_fast.data.images.random_crop import jitter_colours, random_crop, shrink


class CropSettings(NamedTuple):
    """How square training crops are made."""

    image_size: int
    """Side of a crop in pixels."""
    min_crop: float
    """Smallest crop side as a share of the short side, before resizing to `image_size`; never fewer pixels
    than `image_size`, unless the image itself is smaller."""
    colour_jitter: float = 0.0
    """Strength in [0, 1) of random changes of colour, for sets too small to show all colours: channels change
    places, and each is scaled by 1 - jitter to 1 and shifted by at most jitter."""
    max_side: int = 0
    """Larger images are first shrunk until their short side has this many pixels; 0 for none."""


class Crop(NamedTuple):
    pixels: np.ndarray
    """(3, image_size, image_size): uint8, or float32 in [-1, 1] if the colours were changed."""
    seconds: float
    """What it took to make."""


def crop_seed(seed: int, epoch: int, ratio: int, key: str) -> tuple[int, ...]:
    """Return the seed of an image's crop, flip and colours.

    By image, not by place in a batch: a broken image found by a worker moves those after it, which other
    workers are cutting already.
    """
    # Names of files may be any bytes, which Python holds as lone surrogates.
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return seed, epoch, ratio, int.from_bytes(digest, "little"), 5


def decode_crop(data: bytes, seed: tuple[int, ...], mirrored: bool, settings: CropSettings) -> Crop:
    """Return a random crop of an encoded image.

    Raises:
        UserError: the bytes are not a complete image.
    """
    start = time.perf_counter()
    pixels = crop_pixels(decode(data, settings), np.random.default_rng(seed), mirrored, settings)
    return Crop(pixels, time.perf_counter() - start)


def decode(data: bytes, settings: CropSettings) -> Image.Image:
    """Return an encoded image as 8-bit RGB, at most as large as crops are taken from.

    Raises:
        UserError: the bytes are not a complete image.
    """
    image = decode_image(data)
    return shrink(image, settings.max_side) if settings.max_side else image


def crop_pixels(
    image: Image.Image, rng: np.random.Generator, mirrored: bool, settings: CropSettings
) -> np.ndarray:
    """Return a random crop, flipped at random if `mirrored`, as in `Crop.pixels`."""
    crop = random_crop(image, rng, settings.image_size, settings.min_crop, mirrored)
    pixels = np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1))
    if settings.colour_jitter:
        return jitter_colours(pixels.astype(np.float32) / 127.5 - 1, settings.colour_jitter, rng)
    return pixels
