"""Choice of an image's ratio: from its labels, in a configurable order, else from its pixels."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

from PIL.Image import Image

from cat_fast.complexity.description import Description
from cat_fast.complexity.image_score import GivenLabels, ImageScorer
from cat_fast.complexity.ratios.jpeg_thresholds import JPEG_THRESHOLDS, JpegThresholds, jpeg_ratio
from cat_fast.complexity.ratios.origin import scored_by
from cat_fast.complexity.ratios.thresholds import RatioThresholds, Scored, default_thresholds
from cat_fast.complexity.score import Score, Scorer, ScoringFailure
from cat_fast.complexity.scorers.loading import DISTILLED, default_scorer
from cat_fast.complexity.signals.jpeg_size import JPEG_SIDE
from cat_fast.data.images.io import decode_image, image_to_bytes, resize_center_crop
from cat_fast.data.ratio_origin import Pair, RatioOrigin, ScoredBy
from cat_fast.data.streams.formats.base import ShardSet, UnreadableShard
from cat_fast.data.streams.plan import SHARDS_COUNTED, spread
from cat_fast.errors import UserError
from cat_fast.integers import store_integers, to_integer

if TYPE_CHECKING:
    from torch import Tensor

_LABELS_COUNTED = 256
"""Approximate number of labels to count per shard; captions among them are scored."""

Label = Literal["ratio", "score", "caption"]


class Labelled(Protocol):
    """Labels of an image from which a ratio can be derived; missing ones are None or empty."""

    @property
    def ratio(self) -> int | None: ...
    @property
    def score(self) -> int | None: ...
    @property
    def expected(self) -> float | None: ...
    @property
    def caption(self) -> str: ...
    @property
    def has_text(self) -> bool | None: ...
    @property
    def has_faces(self) -> bool | None: ...
    @property
    def scored_by(self) -> ScoredBy | None: ...


@dataclass(frozen=True, kw_only=True)
class RatioChoice:
    """A ratio and the reason for it; the fields of `RatioOrigin` are described there."""

    ratio: int
    source: str
    why: str
    """Human-readable reason: the caption if there is one."""
    score: int | None = None
    """Complexity score 1..9, if there is a score label or a caption was scored."""
    scored_by: ScoredBy | None = None
    thresholds: Pair | None = None
    jpeg_thresholds: Pair | None = None

    @property
    def origin(self) -> RatioOrigin:
        """Origin of the ratio, to be stored with it."""
        return RatioOrigin(
            source=self.source,
            scored_by=self.scored_by,
            thresholds=self.thresholds,
            jpeg_thresholds=self.jpeg_thresholds,
        )

    def __post_init__(self) -> None:
        store_integers(self, "ratio", "score")


class RatioPolicy:
    """Rules for choosing the ratios of images.

    Args:
        labels: the labels to use, in order of precedence; the first one that an image has decides.
        thresholds: map scores to ratios; by default `default_thresholds()`.
        scorer: scores captions; by default `default_scorer()`, loaded for the first caption.
        fixed: one ratio for all images; labels are ignored.
        jpeg: map JPEG sizes to ratios; by default the published thresholds.
        pixels: scores images without the labels, such as `image_student()`; None to use `jpeg`.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        thresholds: RatioThresholds | None = None,
        scorer: Scorer | None = None,
        fixed: int | None = None,
        jpeg: JpegThresholds = JPEG_THRESHOLDS,
        pixels: ImageScorer | None = None,
    ) -> None:
        self.labels, self.jpeg, self.pixels = labels, jpeg, pixels
        self._scorer = scorer
        self.thresholds = thresholds or default_thresholds()
        self._pair = self.thresholds.pair
        fixed = None if fixed is None else to_integer("fixed", fixed)
        self.fixed = fixed and RatioChoice(ratio=fixed, source="fixed", why=f"fixed {fixed}x")

    def choose(self, images: Sequence[Labelled]) -> list[RatioChoice | UserError | None]:
        """Choose by labels, with all captions scored in one batch.

        Returns:
            Per image: its choice; the error if its labels are invalid, without effect on other images; or
            None if it has none of the labels, in which case `choose_by_pixels` can be used.
        """
        if self.fixed:
            return [self.fixed] * len(images)
        deciding = [self._deciding_label(image) for image in images]
        captioned = [image for image, label in zip(images, deciding, strict=True) if label == "caption"]
        scores = iter(self._score(captioned))
        found: list[RatioChoice | UserError | None] = []
        for image, label in zip(images, deciding, strict=True):
            score = next(scores) if label == "caption" else image if label == "score" else None
            try:
                found.append(self._choice(image, label, score))
            except UserError as error:
                found.append(error)
        return found

    @property
    def scorer(self) -> Scorer:
        """Scorer of captions."""
        return self._scorer or default_scorer()

    @cached_property
    def scored_by(self) -> ScoredBy:
        """Scorer of captions, with the default thresholds if it is distilled, else this policy's."""
        is_distilled = self.scorer.name in DISTILLED
        return scored_by(self.scorer, default_thresholds() if is_distilled else self.thresholds)

    def choose_by_pixels(self, image: Image) -> RatioChoice:
        """Choose by the scorer of images, or the JPEG size of the image's centre square.

        Raises:
            UserError: the image cannot be scored.
        """
        if self.pixels is not None:
            (found,) = self.pixels.score_images([self.pixels.prepare(image)], [GivenLabels()])
            if isinstance(found, ScoringFailure):
                raise UserError(found.error)
            return RatioChoice(
                ratio=self.thresholds.ratio_of(found.score),
                source="pixels",
                why=f"no caption; by {self.pixels.name}",
                score=found.score.score,
                scored_by=ScoredBy(self.pixels.name, self.pixels.version, default_thresholds().pair),
                thresholds=self._pair,
            )
        return RatioChoice(
            ratio=ratio_of_image(image, self.jpeg),
            source="jpeg size",
            why="no caption; by JPEG size",
            jpeg_thresholds=(self.jpeg.a, self.jpeg.b),
        )

    def ratio_from_labels(self, image: Labelled) -> int | None:
        """Return the ratio derived from labels, None if they are missing or invalid."""
        (choice,) = self.choose([image])
        return choice.ratio if isinstance(choice, RatioChoice) else None

    def _deciding_label(self, image: Labelled) -> Label | None:
        return next((label for label in self.labels if getattr(image, label) not in (None, "")), None)

    def _choice(
        self, image: Labelled, label: Label | None, score: Scored | UserError | None
    ) -> RatioChoice | None:
        if isinstance(score, UserError):
            raise score
        if label is None:
            return None
        if score is None:
            assert image.ratio is not None
            return RatioChoice(ratio=image.ratio, source=label, why="ratio label", scored_by=image.scored_by)
        captioned = label == "caption"
        return RatioChoice(
            ratio=self.thresholds.ratio_of(score),
            source=label,
            why=image.caption if captioned else f"score {score.score}",
            score=score.score,
            scored_by=self.scored_by if captioned else image.scored_by,
            thresholds=self._pair,
        )

    def _score(self, images: Sequence[Labelled]) -> list[Score | UserError]:
        if not images:
            return []
        try:
            results = self.scorer.score_many([_describe(image) for image in images])
            return [UserError(r.error) if isinstance(r, ScoringFailure) else r for r in results]
        except UserError as error:
            if len(images) == 1:
                return [error]
        return [score for image in images for score in self._score([image])]


class OriginTally:
    """Numbers of images per origin of their ratio, counted while a policy derives ratios from labels."""

    def __init__(self, policy: RatioPolicy) -> None:
        self.policy = policy
        self.origins: Counter[RatioOrigin] = Counter()
        self.ratios: Counter[int] = Counter()

    def ratio_from_labels(self, image: Labelled) -> int | None:
        """Return `RatioPolicy.ratio_from_labels`, and count the image."""
        return self.add([image])[0]

    def add(self, images: Sequence[Labelled]) -> list[int | None]:
        """Count images, with all captions scored in one batch; return their ratios."""
        choices = self.policy.choose(images)
        found = [choice if isinstance(choice, RatioChoice) else None for choice in choices]
        self.origins.update(choice.origin for choice in found if choice)
        self.ratios.update(choice.ratio for choice in found if choice)
        return [choice.ratio if choice else None for choice in found]

    def count(self, shards: ShardSet) -> None:
        """Count a part of the images of a data set by the labels that its shards list."""
        for index in spread(len(shards.names), SHARDS_COUNTED):
            with suppress(UnreadableShard):
                labels = shards.labels(index) or []
                self.add(labels[:: max(1, len(labels) // _LABELS_COUNTED)])


def jpeg_image(image: Image) -> "Tensor":
    """Return the pixels whose JPEG size counts: the centre square, scaled to 512 px, uint8 (3, 512, 512)."""
    return image_to_bytes(resize_center_crop(image, JPEG_SIDE))


def ratio_of_image(image: Image, thresholds: JpegThresholds = JPEG_THRESHOLDS) -> int:
    """Return the ratio of a decoded image by the JPEG size of its centre square, scaled to 512 px."""
    return jpeg_ratio(jpeg_image(image), thresholds)


def ratio_of_file(data: bytes, thresholds: JpegThresholds = JPEG_THRESHOLDS) -> int:
    """Return the ratio of an encoded image by its JPEG size.

    Raises:
        UserError: the bytes are not a complete image.
    """
    return ratio_of_image(decode_image(data), thresholds)


def _describe(image: Labelled) -> Description:
    return Description(image.caption, image.has_text, image.has_faces)
