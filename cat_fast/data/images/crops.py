"""Random square crops of pictures held in memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cat_fast.data.images.io import image_to_tensor, load_image
from cat_fast.data.images.random_crop import jitter_colours, random_crop


class CropDataset:
    """Square training crops.

    Args:
        pictures: 8-bit RGB, such as `load_shrunk` gives.
        image_size: side of a crop in pixels.
        min_crop: smallest crop side as a share of the short side, before resizing to `image_size`; never
            fewer pixels than `image_size` unless the picture itself is smaller.
        mirrored: per picture, whether it may be flipped left to right (text may not).
        colour_jitter: strength in [0, 1) of random changes of colour, for sets too small to show all colours:
            channels change places, and each is scaled by 1 - jitter to 1 and shifted by at most jitter.
    """

    def __init__(
        self,
        pictures: Sequence[Image.Image],
        image_size: int,
        min_crop: float,
        mirrored: Sequence[bool],
        colour_jitter: float = 0.0,
    ) -> None:
        self.pictures = pictures
        self.image_size = image_size
        self.min_crop = min_crop
        self.mirrored = mirrored
        self.colour_jitter = colour_jitter

    def crop(self, index: int, rng: np.random.Generator) -> Tensor:
        """A random crop of one picture, (3, image_size, image_size) in [-1, 1]."""
        crop = random_crop(
            self.pictures[index], rng, self.image_size, self.min_crop, mirrored=self.mirrored[index]
        )
        x = image_to_tensor(crop)
        return (
            torch.from_numpy(jitter_colours(x.numpy(), self.colour_jitter, rng)) if self.colour_jitter else x
        )

    def batch(self, indices: list[int], rng: np.random.Generator) -> Tensor:
        """(len(indices), 3, image_size, image_size) in [-1, 1]."""
        return torch.stack([self.crop(index, rng) for index in indices])


def load_shrunk(path: str | Path, max_side: int) -> Image.Image:
    """A picture as 8-bit RGB with its short side at most `max_side`.

    Raises:
        UserError: it cannot be read, as `load_image` says.
    """
    picture = load_image(path)
    scale = max_side / min(picture.size)
    if scale >= 1:
        return picture
    return picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
    )
