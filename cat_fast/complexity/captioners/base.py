"""Interface of captioners, and what they share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from cat_fast.complexity.description import Description
from cat_fast.errors import UserError

MAX_SIDE = 2048
"""Larger images are scaled down to this number of pixels before they are described."""


@dataclass(frozen=True)
class DescriptionFailure:
    """An image that could not be described; it has no description."""

    error: str
    """Reason in one line."""


class Captioner(Protocol):
    """Interface of everything that describes images: vision-language models, endpoints, detectors."""

    @property
    def name(self) -> str:
        """Name of the captioner, stored with its descriptions."""
        ...

    @property
    def version(self) -> str:
        """Version of the captioner, which differs if its descriptions do; stored with them."""
        ...

    @property
    def writes_captions(self) -> bool:
        """False if it needs a caption per image, such as detectors."""
        ...

    @property
    def concurrent(self) -> bool:
        """True if several threads may use it at a time."""
        ...

    def describe_many(
        self, images: Sequence[Image.Image], captions: Sequence[str | None] | None = None
    ) -> list[Description | DescriptionFailure]:
        """Describe each RGB image, in order.

        An image that cannot be described gets a `DescriptionFailure` and does not affect the others. Errors
        that concern all of them, such as a missing package, raise UserError.

        Args:
            images: as from `load_image`.
            captions: known caption per image, kept as it is; None where the captioner writes one.
        """
        ...


def known_captions(
    images: Sequence[Image.Image], captions: Sequence[str | None] | None
) -> Sequence[str | None]:
    """Return one caption or None per image.

    Raises:
        UserError: there is not one per image.
    """
    if captions is None:
        return [None] * len(images)
    if len(captions) != len(images):
        raise UserError(f"expected one caption per image, {len(images)} in all, got {len(captions)}")
    return captions


def shrink(image: Image.Image, max_side: int) -> Image.Image:
    """Return an image scaled down to at most `max_side` pixels per side; smaller ones are returned as is."""
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(round(side * scale), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
