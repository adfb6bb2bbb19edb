"""JPEG size as a scorer of images: the published baseline on the scale of the scores."""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Sequence

from PIL import Image

from cat_fast.complexity.image_score import GivenLabels, ImageScore
from cat_fast.complexity.ratios.jpeg_thresholds import JPEG_THRESHOLDS, JpegThresholds
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.complexity.signals.jpeg_size import JPEG_SIDE, jpeg_bytes
from cat_fast.data.images.io import image_to_bytes, resize_center_crop

_SCORES = (1.0, 4.0, 7.0, 9.0)
"""Scores at zero bytes, at the thresholds, which become the published ones of scores, and at the end."""
_LARGEST = 118_428
"""Largest of 41,000 COCO images at 512 px, as published."""


class JpegScorer:
    """Size of the JPEG of 512 px as a score from 1 to 9.

    The expected score is linear in the size between the thresholds: 1 at zero bytes, 4 at `a`, 7 at `b`, and
    9 at the largest published size, or at `a` + `b` if that is larger. The integer score is rounded up, so
    that the published thresholds of scores choose the same ratios as `a` and `b` on bytes.
    """

    name = "jpeg"

    def __init__(self, thresholds: JpegThresholds = JPEG_THRESHOLDS) -> None:
        self.thresholds = thresholds
        self._sizes = (0, thresholds.a, thresholds.b, max(_LARGEST, thresholds.a + thresholds.b))
        self.version = hashlib.sha256(repr((self._sizes, JPEG_SIDE)).encode()).hexdigest()[:12]

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return the centre square at 512 px."""
        return resize_center_crop(image, JPEG_SIDE)

    def score_images(
        self, images: Sequence[Image.Image], given: Sequence[GivenLabels] = ()
    ) -> list[ImageScore | ScoringFailure]:
        """Score each prepared image, in order."""
        return [ImageScore(self.score_bytes(jpeg_bytes(image_to_bytes(image)))) for image in images]

    def score_bytes(self, size: int) -> Score:
        """Return the score of a JPEG size in bytes."""
        part = bisect_left(self._sizes[1:3], size)  # a size equal to a threshold is below it
        (low, high), (start, end) = self._sizes[part : part + 2], _SCORES[part : part + 2]
        expected = min(start + (end - start) * (size - low) / max(high - low, 1), end)
        return Score(math.ceil(expected), expected, reasons=f"{size} bytes as a JPEG of {JPEG_SIDE} px")
