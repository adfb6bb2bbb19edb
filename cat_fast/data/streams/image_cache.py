"""Cache of decoded images: a data set that fits is decoded once."""

import time

import numpy as np
from PIL import Image

from cat_fast.data.streams.buffers import Sample
from cat_fast.data.streams.decoding import Crop, CropSettings, crop_pixels, decode


class ImageCache:
    """Decoded images of one rank, up to `capacity` bytes.

    Nothing is evicted: an epoch uses every image once, so an evicted image would be needed as soon as the one
    that replaces it. Images that do not fit are decoded again each time.
    """

    def __init__(self, capacity: int, settings: CropSettings) -> None:
        self.capacity, self.settings = capacity, settings
        self.size = 0
        self.full = False
        self._images: dict[tuple[str, int], Image.Image] = {}

    def __len__(self) -> int:
        return len(self._images)

    def serves(self, sample: Sample) -> bool:
        """Return whether a sample is cached, or may still fit."""
        return not self.full or (sample.shard, sample.number) in self._images

    def crop(self, sample: Sample, seed: tuple[int, ...]) -> Crop:
        """Return the result of `decode_crop` for a sample, and cache the decoded image if it fits.

        Raises:
            UserError: the sample is not a complete image.
        """
        start = time.perf_counter()
        image = self._images.get((sample.shard, sample.number)) or self._decode(sample)
        pixels = crop_pixels(image, np.random.default_rng(seed), sample.allow_flip, self.settings)
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
