"""Choice of an image's ratio: from its labels, in a configurable order, else from its JPEG size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL.Image import Image

from cat_fast.complexity.choose import Scorer
from cat_fast.complexity.description import Description
from cat_fast.complexity.embedded_scorer import default_scorer, default_thresholds
from cat_fast.complexity.jpeg_size import JPEG_SIDE, jpeg_ratio
from cat_fast.complexity.ratio import RatioThresholds
from cat_fast.data.images.io import decode_image, image_to_bytes, resize_center_crop
from cat_fast.errors import UserError

Label = Literal["ratio", "score", "caption"]


class Labelled(Protocol):
    """Labels of an image from which a ratio can be derived; missing ones are None or empty."""

    @property
    def ratio(self) -> int | None: ...
    @property
    def score(self) -> int | None: ...
    @property
    def caption(self) -> str: ...
    @property
    def has_text(self) -> bool: ...
    @property
    def has_faces(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class RatioChoice:
    """A ratio and the reason for it."""

    ratio: int
    source: str
    """One of "fixed", "ratio", "score", "caption" and "jpeg size"."""
    why: str
    """Human-readable reason: the caption if there is one."""
    score: int | None = None
    """Complexity score 1..9, if there is a score label or a caption was scored."""


class RatioPolicy:
    """Rules for choosing the ratios of images.

    Args:
        labels: the labels to use, in order of precedence; the first one that an image has decides.
        thresholds: map scores to ratios; by default those of the packaged scorer.
        scorer: scores captions; by default the packaged one.
        fixed: one ratio for all images; labels are ignored.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        thresholds: RatioThresholds | None = None,
        scorer: Scorer | None = None,
        fixed: int | None = None,
    ) -> None:
        self.labels, self.scorer = labels, scorer
        self.thresholds = thresholds or default_thresholds()
        self.fixed = fixed and RatioChoice(ratio=fixed, source="fixed", why=f"fixed {fixed}x")

    def choose(self, images: Sequence[Labelled]) -> list[RatioChoice | UserError | None]:
        """Choose by labels, with all captions scored in one batch.

        Returns:
            Per image: its choice; the error if its labels are invalid, without effect on other images; or
            None if it has none of the labels, in which case `choose_by_jpeg` can be used.
        """
        if self.fixed:
            return [self.fixed] * len(images)
        deciding = [self._deciding_label(image) for image in images]
        captioned = [image for image, label in zip(images, deciding, strict=True) if label == "caption"]
        scores = iter(self._score(captioned))
        found: list[RatioChoice | UserError | None] = []
        for image, label in zip(images, deciding, strict=True):
            score = next(scores) if label == "caption" else image.score if label == "score" else None
            try:
                found.append(self._choice(image, label, score))
            except UserError as error:
                found.append(error)
        return found

    def choose_by_jpeg(self, image: Image) -> RatioChoice:
        """Choose by the JPEG size of the image's centre square."""
        return RatioChoice(ratio=ratio_of_image(image), source="jpeg size", why="no caption; by JPEG size")

    def ratio_from_labels(self, image: Labelled) -> int | None:
        """Return the ratio derived from labels, None if they are missing or invalid."""
        (choice,) = self.choose([image])
        return choice.ratio if isinstance(choice, RatioChoice) else None

    def _deciding_label(self, image: Labelled) -> Label | None:
        return next((label for label in self.labels if getattr(image, label) not in (None, "")), None)

    def _choice(
        self, image: Labelled, label: Label | None, score: int | UserError | None
    ) -> RatioChoice | None:
        if isinstance(score, UserError):
            raise score
        if label is None:
            return None
        if score is None:
            assert image.ratio is not None
            return RatioChoice(ratio=image.ratio, source=label, why="ratio label")
        why = image.caption if label == "caption" else f"score {score}"
        return RatioChoice(ratio=self.thresholds.ratio(score), source=label, why=why, score=score)

    def _score(self, images: Sequence[Labelled]) -> list[int | UserError]:
        if not images:
            return []
        scorer = self.scorer or default_scorer()
        try:
            return [*scorer.score_many([_describe(image) for image in images])]
        except UserError as error:
            if len(images) == 1:
                return [error]
        return [score for image in images for score in self._score([image])]


def ratio_of_image(image: Image) -> int:
    """Return the ratio of a decoded image by the JPEG size of its centre square, scaled to 512 px."""
    return jpeg_ratio(image_to_bytes(resize_center_crop(image, JPEG_SIDE)))


def ratio_of_file(data: bytes) -> int:
    """Return the ratio of an encoded image by its JPEG size.

    Raises:
        UserError: the bytes are not a complete image.
    """
    return ratio_of_image(decode_image(data))


def _describe(image: Labelled) -> Description:
    return Description(image.caption, image.has_text, image.has_faces)
