"""From a file's bytes to a training crop: what a worker does. Free of torch, so that it starts quickly."""

import hashlib
import time
from typing import NamedTuple

import numpy as np

from cat_fast.data.images.io import decode_image
from cat_fast.data.images.random_crop import jitter_colours, random_crop


class CropSettings(NamedTuple):
    """As in `CropDataset`."""

    image_size: int
    min_crop: float
    colour_jitter: float = 0.0


class Crop(NamedTuple):
    pixels: np.ndarray
    """(3, image_size, image_size): uint8, or float32 in [-1, 1] if the colours were changed."""
    seconds: float
    """What it took to make."""


def crop_seed(seed: int, epoch: int, ratio: int, key: str) -> tuple[int, ...]:
    """Of a picture's crop, flip and colours.

    By picture, not by place in a batch: a broken picture found by a worker moves those after it, which other
    workers are cutting already.
    """
    # Names of files may be any bytes, which Python holds as lone surrogates.
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return seed, epoch, ratio, int.from_bytes(digest, "little"), 5


def decode_crop(data: bytes, seed: tuple[int, ...], mirrored: bool, settings: CropSettings) -> Crop:
    """A random crop of a picture.

    Raises:
        UserError: the bytes are no whole picture.
    """
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    crop = random_crop(decode_image(data), rng, settings.image_size, settings.min_crop, mirrored)
    pixels = np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1))
    if settings.colour_jitter:
        pixels = jitter_colours(pixels.astype(np.float32) / 127.5 - 1, settings.colour_jitter, rng)
    return Crop(pixels, time.perf_counter() - start)
