"""Captioner without a language model: detectors of text and faces, with captions from the caller."""

import hashlib
from collections.abc import Sequence

from PIL import Image

from cat_fast.complexity.captioners import faces, text_boxes
from cat_fast.complexity.captioners.base import DescriptionFailure, known_captions
from cat_fast.complexity.description import Description
from cat_fast.errors import UserError, one_line


class Detectors:
    """Flags of text and faces from RapidOCR and OpenCV, in about a CPU second per image.

    The caption is that of the caller, or of a label (`Description.from_label`). Requires the extra `detect`.

    Raises:
        UserError: a package is missing.
    """

    name = "detectors"
    writes_captions = False
    concurrent = False

    def __init__(self, threads: int = 1) -> None:
        """Load the models of the detectors.

        Args:
            threads: of text detection; several processes are faster than several threads.
        """
        self._text = text_boxes.TextDetector(threads)
        self._faces = faces.FaceDetector()
        self.packages = {"rapidocr-onnxruntime": self._text.version, "opencv": self._faces.version}
        self.version = hashlib.sha256(repr((self.packages, _SETTINGS)).encode()).hexdigest()[:12]

    def find_flags(self, image: Image.Image) -> tuple[bool, bool]:
        """Return whether an RGB image contains text, and whether it contains a face."""
        return text_boxes.contains_text(self._text.find(image)), bool(self._faces.find(image))

    def describe_many(
        self, images: Sequence[Image.Image], captions: Sequence[str | None] | None = None
    ) -> list[Description | DescriptionFailure]:
        """Describe each image that has a caption, in order.

        Raises:
            UserError: there is not one caption per image.
        """
        known = known_captions(images, captions)
        return [self._describe(image, caption) for image, caption in zip(images, known, strict=True)]

    def _describe(self, image: Image.Image, caption: str | None) -> Description | DescriptionFailure:
        if caption is None:
            return DescriptionFailure(
                "the image has no caption, and detectors write none; give a caption or a label, or use a"
                " vision-language model"
            )
        try:
            Description(caption)  # before the expensive part
            return Description(caption, *self.find_flags(image))
        except UserError as error:
            return DescriptionFailure(one_line(error))


_SETTINGS = (
    (text_boxes.MAX_SIDE, text_boxes.MIN_CONFIDENCE, text_boxes.MIN_LETTERS),
    (text_boxes.MAX_BOXES, text_boxes.MIN_BOXES, text_boxes.MIN_AREA),
    (faces.MAX_SIDE, faces.MIN_SIDE, faces.RULE),
)
"""All settings that the flags depend on."""
