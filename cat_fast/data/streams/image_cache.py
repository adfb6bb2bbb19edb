"""Decoded images kept in memory, so that a set that fits is decoded once."""

import time

import numpy as np
from PIL import Image

from cat_fast.data.streams.buffers import Sample
from cat_fast.data.streams.decoding import Crop, CropSettings, crop_pixels, decode


class ImageCache:
    """Decoded images of one rank, up to a number of bytes.

    Nothing is evicted: an epoch draws every image once, so of a set that does not fit, the image that would
    be dropped for another is needed just as soon. Images without room are decoded again each time.
    """

    def __init__(self, capacity: int, settings: CropSettings) -> None:
        self.capacity, self.settings = capacity, settings
        self.size = 0
        self.full = False
        self._images: dict[tuple[str, int], Image.Image] = {}

    def __len__(self) -> int:
        return len(self._images)

    def serves(self, sample: Sample) -> bool:
        """Return whether a sample is held, or there may be room for it."""
        return not self.full or (sample.shard, sample.number) in self._images

    def crop(self, sample: Sample, seed: tuple[int, ...]) -> Crop:
        """Return what `decode_crop` returns of a sample, and keep the decoded image if there is room.

        Raises:
            UserError: the sample is not a complete image.
        """
        start = time.perf_counter()
        image = self._images.get((sample.shard, sample.number)) or self._decode(sample)
        pixels = crop_pixels(image, np.random.default_rng(seed), sample.mirrored, self.settings)
        return Crop(pixels, time.perf_counter() - start)

    def _decode(self, sample: Sample) -> Image.Image:
        image = decode(sample.data, self.settings)
        size = 4 * image.width * image.height  # Pillow pads RGB to four bytes per pixel
        if self.size + size > self.capacity:
            self.full = True
        else:
            self._images[sample.shard, sample.number] = image
            self.size += size
        return image
