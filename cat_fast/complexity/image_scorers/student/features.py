"""Features of an image that the student reads."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from cat_fast.complexity.image_scorers.student import low_level, trunk
from cat_fast.complexity.image_scorers.student.trunk import Trunk
from cat_fast.data.images.io import resize_center_crop


class Features(NamedTuple):
    """Features of one image, or of images as rows."""

    trunk: np.ndarray
    """Statistics of the frozen convolutions, float32 (..., 1920)."""
    low: np.ndarray
    """Low-level features, float32 (..., 27)."""


def prepare(image: Image.Image) -> Image.Image:
    """Return the two squares that features are computed from, next to each other in one image.

    The left one is the centre square, the right one the complete image, whose aspect ratio is not kept.
    """
    both = Image.new("RGB", (low_level.SIDE + trunk.SIDE, low_level.SIDE))
    both.paste(resize_center_crop(image, low_level.SIDE), (0, 0))
    both.paste(image.resize((trunk.SIDE, trunk.SIDE), Image.Resampling.BICUBIC), (low_level.SIDE, 0))
    return both


def compute(prepared: Image.Image, network: Trunk) -> Features:
    """Return the features of a prepared image."""
    side = low_level.SIDE
    square = prepared.crop((0, 0, side, side))
    complete = prepared.crop((side, 0, side + trunk.SIDE, trunk.SIDE))
    return Features(network.features(np.asarray(complete)), low_level.low_level_features(square))
