"""Detection of faces with OpenCV's Haar cascades."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cat_fast.complexity.captioners.base import shrink
from cat_fast.complexity.extras import import_extra
from cat_fast.errors import UserError

MAX_SIDE = 640
"""Larger images are scaled down to this number of pixels, where most faces remain visible."""
MIN_SIDE = 24
"""Side of the smallest face, in pixels of the scaled image."""
_FIRST, _SECOND = "haarcascade_frontalface_default.xml", "haarcascade_frontalface_alt2.xml"
_FIRST_NEIGHBOURS, _SECOND_NEIGHBOURS = 3, 2
"""Overlapping detections that a face needs in addition to one, per cascade."""
_FIRST_STEP, _SECOND_STEP = 1.1, 1.05
"""Ratio of one size to the next, per cascade."""
_MARGIN = 0.5
_SIZES = 0.6, 1.6
"""Smallest and largest size of the second detection, relative to the first one."""
_MIN_OVERLAP = 0.4
RULE = (
    (_FIRST, _FIRST_NEIGHBOURS, _FIRST_STEP),
    (_SECOND, _SECOND_NEIGHBOURS, _SECOND_STEP),
    (_MARGIN, _SIZES, _MIN_OVERLAP),
)
"""All settings of the two cascades."""

Box = tuple[int, int, int, int]
"""Left, top, width and height."""


class FaceDetector:
    """Frontal faces on which two cascades agree.

    Alone, each cascade finds faces in foliage and print; their errors differ. The second one runs only around
    the detections of the first.

    Raises:
        UserError: OpenCV is missing, or its version has no cascades.
    """

    def __init__(self) -> None:
        cv2: Any = import_extra("cv2", "opencv-python-headless", "detect", "detection of faces")
        folder = Path(cv2.data.haarcascades) if hasattr(cv2, "data") else Path()
        if not hasattr(cv2, "CascadeClassifier") or not (folder / _FIRST).is_file():
            raise UserError(
                f"OpenCV {cv2.__version__} has no face cascades; install version 4 with pip install"
                " 'cat-fast[detect]'"
            )
        self.version = str(cv2.__version__)
        self._first, self._second = (cv2.CascadeClassifier(str(folder / name)) for name in (_FIRST, _SECOND))

    def find(self, image: Image.Image) -> list[Box]:
        """Return the faces in an RGB image, in pixels of the image scaled down to `MAX_SIDE`."""
        pixels = np.asarray(shrink(image, MAX_SIDE).convert("L"))
        if min(pixels.shape) < MIN_SIDE:
            return []
        found = self._first.detectMultiScale(
            pixels, _FIRST_STEP, _FIRST_NEIGHBOURS, minSize=(MIN_SIDE, MIN_SIDE)
        )
        boxes: list[Box] = [(int(x), int(y), int(width), int(height)) for x, y, width, height in found]
        return [box for box in boxes if self._confirmed(pixels, box)]

    def _confirmed(self, pixels: np.ndarray, box: Box) -> bool:
        x, y, width, height = box
        margin = round(_MARGIN * width)
        left, top = max(x - margin, 0), max(y - margin, 0)
        crop = np.ascontiguousarray(pixels[top : y + height + margin, left : x + width + margin])
        smallest, largest = (round(size * width) for size in _SIZES)
        found = self._second.detectMultiScale(
            crop, _SECOND_STEP, _SECOND_NEIGHBOURS, minSize=(smallest, smallest), maxSize=(largest, largest)
        )
        own = (x - left, y - top, width, height)
        return any(overlap(own, other) >= _MIN_OVERLAP for other in found)


def overlap(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the intersection of two boxes over their union."""
    sides = [
        min(first[axis] + first[axis + 2], second[axis] + second[axis + 2]) - max(first[axis], second[axis])
        for axis in (0, 1)
    ]
    if min(sides) <= 0:
        return 0.0
    shared = float(sides[0]) * float(sides[1])
    return shared / (float(first[2]) * first[3] + float(second[2]) * second[3] - shared)
