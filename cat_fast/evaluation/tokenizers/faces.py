"""Faces in images, and the share of them that is found again in a reconstruction."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from cat_fast.errors import UserError

BINS = {256: (0.1, 0.2, 0.3, 1.0), 512: (0.05, 0.1, 0.2, 1.0), 1024: (0.02, 0.05, 0.1, 1.0)}
"""Edges of TokBench's bins of relative face size, by resolution."""
_CASCADE = "haarcascade_frontalface_default.xml"
_NEIGHBOURS = 5
_MIN_SIDE = 24
_MIN_OVERLAP = 0.4

Box = tuple[int, int, int, int]
"""Left, top, width and height."""


def require_detector() -> str:
    """Return OpenCV's version.

    Raises:
        UserError: OpenCV is missing, or has no cascades, as version 5.
    """
    if importlib.util.find_spec("cv2") is None:
        raise UserError("faces: run `pip install 'cat-fast[eval]'`, or leave faces out with --no-faces")
    import cv2

    if not hasattr(cv2, "CascadeClassifier") or _detector().empty():
        raise UserError(
            f"faces: OpenCV {cv2.__version__} has no face cascades; install version 4 with pip install"
            " 'cat-fast[eval]', or leave faces out with --no-faces"
        )
    return str(cv2.__version__)


def find_faces(image: Image.Image) -> list[Box]:
    """Return the frontal faces in an image, by OpenCV's Haar cascade."""
    pixels = np.asarray(image.convert("L"))
    if min(pixels.shape) < _MIN_SIDE:
        return []
    found = _detector().detectMultiScale(pixels, 1.1, _NEIGHBOURS, minSize=(_MIN_SIDE, _MIN_SIDE))
    return sorted(tuple(map(int, box)) for box in found)  # type: ignore[misc]


def found_again(original: Sequence[Box], other: Sequence[Box]) -> list[bool]:
    """Return for each face of the original whether a face of the other image overlaps it by 40 %."""
    return [any(_overlap(face, candidate) >= _MIN_OVERLAP for candidate in other) for face in original]


def _overlap(first: Box, second: Box) -> float:
    """Return the intersection of two boxes over their union."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (first[2] * first[3] + second[2] * second[3] - shared)


@cache
def _detector() -> Any:
    import cv2

    folder = cv2.data.haarcascades if hasattr(cv2, "data") else ""
    return cv2.CascadeClassifier(folder + _CASCADE)
