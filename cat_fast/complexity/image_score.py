"""Results of scoring images, and the interface that all scorers of images share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image

from cat_fast.complexity.description import Description
from cat_fast.complexity.score import Score, ScoringFailure


@dataclass(frozen=True)
class GivenLabels:
    """Labels that an image has before it is described; all may be unknown."""

    caption: str = ""
    has_text: bool | None = None
    has_faces: bool | None = None
    label: str = ""
    """Class of the image."""


@dataclass(frozen=True)
class ImageScore:
    """Score of an image."""

    score: Score
    description: Description | None = None
    """Description that was scored; None if the score is of the pixels."""


@runtime_checkable
class ImageScorer(Protocol):
    """Interface of everything that scores images: signals of their pixels, or captioners with a scorer."""

    @property
    def name(self) -> str:
        """Name of the scorer, stored with its scores."""
        ...

    @property
    def version(self) -> str:
        """Version of the scorer, which differs if its scores do; stored with them."""
        ...

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return what scoring needs of an RGB image, scaled down; runs on several threads."""
        ...

    def score_images(
        self, images: Sequence[Image.Image], given: Sequence[GivenLabels]
    ) -> list[ImageScore | ScoringFailure]:
        """Score each prepared image, in order.

        An image that cannot be scored gets a `ScoringFailure` and does not affect the others. Errors that
        concern all of them, such as a missing model, raise UserError.

        Args:
            images: from `prepare`.
            given: labels per image; scorers of pixels ignore them.
        """
        ...
