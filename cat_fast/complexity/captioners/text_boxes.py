"""Detection of text with RapidOCR."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image

from cat_fast.complexity.captioners.base import shrink
from cat_fast.complexity.extras import import_extra

MAX_SIDE = 1024
"""Larger images are scaled down to this number of pixels."""
MAX_ASPECT = 4
"""Longer side over shorter side of images that are read as they are."""
MIN_CONFIDENCE = 0.6
"""Recognition below this confidence is texture rather than text."""
MIN_LETTERS = 2
"""Letters and digits per box: single ones are found in rings, poles and windows."""
MAX_BOXES = 8
"""Boxes that are read per image."""
MIN_BOXES = 3
MIN_AREA = 0.003
"""An image contains text from this number of boxes or this share of its area."""


@dataclass(frozen=True)
class TextBox:
    """A piece of text in an image."""

    text: str
    confidence: float
    """Of the recognition, 0 to 1."""
    area: float
    """Share of the image's area."""

    @property
    def readable(self) -> bool:
        """True if it is probably text."""
        letters = sum(letter.isalnum() for letter in self.text)
        return self.confidence >= MIN_CONFIDENCE and letters >= MIN_LETTERS


class TextDetector:
    """Text in any orientation, read by RapidOCR's packaged models for Latin and Chinese script.

    Raises:
        UserError: RapidOCR is missing.
    """

    def __init__(self, threads: int = 1) -> None:
        package = import_extra("rapidocr_onnxruntime", "rapidocr-onnxruntime", "detect", "detection of text")
        self.version = version("rapidocr-onnxruntime")
        self._reader: Any = package.RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)

    def find(self, image: Image.Image) -> list[TextBox]:
        """Return the largest boxes of text in an RGB image, also those that are not readable.

        Boxes are read from the largest one until they are enough for `contains_text`: reading costs more than
        finding, and a page has a hundred lines.
        """
        small = shrink(image, MAX_SIDE)
        pixels_BGR = _widened(np.asarray(small)[:, :, ::-1])
        corners, _ = self._reader(pixels_BGR, use_cls=False, use_rec=False)
        size = small.width * small.height
        boxes = [(_area(box) / size, np.asarray(box, dtype=np.float32)) for box in corners or []]
        found: list[TextBox] = []
        for area, box in sorted(boxes, key=lambda item: -item[0])[:MAX_BOXES]:
            (crop,) = self._reader.get_crop_img_list(pixels_BGR, [box])
            # Classification of upside-down text would double the time, and is not needed to find text.
            ((text, confidence),), _ = self._reader(crop, use_det=False, use_cls=False)
            found.append(TextBox(text, float(confidence), area))
            if contains_text(found):
                break
        return found


def contains_text(boxes: Sequence[TextBox]) -> bool:
    """Return whether boxes are enough text to be noticed: several, or a large one."""
    readable = [box for box in boxes if box.readable]
    return len(readable) >= MIN_BOXES or sum(box.area for box in readable) >= MIN_AREA


def _widened(pixels: np.ndarray) -> np.ndarray:
    """Return the image, (H, W, 3), with narrow ones repeated beyond their right or lower border.

    RapidOCR enlarges the shorter side to 736 pixels: a strip of 1000 x 3 would take 20 GB.
    """
    least = -(-max(pixels.shape[:2]) // MAX_ASPECT)
    missing = [max(0, least - side) for side in pixels.shape[:2]]
    return np.pad(pixels, [(0, missing[0]), (0, missing[1]), (0, 0)], mode="edge")


def _area(corners: Sequence[Sequence[float]]) -> float:
    """Return the area of a polygon by the shoelace formula."""
    x, y = np.asarray(corners, dtype=np.float64).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
