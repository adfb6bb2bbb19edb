"""Faces of images, and the share of them that is found again in a reconstruction."""

from collections.abc import Sequence
from functools import cache

from PIL import Image

from cat_fast.complexity.captioners.faces import MAX_SIDE, Box, FaceDetector, overlap
from cat_fast.errors import UserError

BINS = {256: (0.1, 0.2, 0.3, 1.0), 512: (0.05, 0.1, 0.2, 1.0), 1024: (0.02, 0.05, 0.1, 1.0)}
"""Edges of TokBench's bins of relative face size, by resolution."""
_MIN_OVERLAP = 0.4


def require_detector() -> str:
    """Return the version of the face detector.

    Raises:
        UserError: OpenCV is missing, or has no cascades.
    """
    try:
        return _detector().version
    except UserError as error:
        raise UserError(f"{error}; or leave faces out with --no-faces") from error


def find_faces(image: Image.Image) -> list[Box]:
    """Return the frontal faces in an RGB image, in pixels of the image scaled down to `MAX_SIDE`."""
    return sorted(_detector().find(image))


def relative_size(face: Box, side: int) -> float:
    """Return the side of a face relative to that of its square image of `side` pixels."""
    return max(face[2:]) / min(side, MAX_SIDE)


def found_again(original: Sequence[Box], other: Sequence[Box]) -> list[bool]:
    """Return for each face of the original whether a face of the other image overlaps it by 40 %."""
    return [any(overlap(face, candidate) >= _MIN_OVERLAP for candidate in other) for face in original]


@cache
def _detector() -> FaceDetector:
    return FaceDetector()
