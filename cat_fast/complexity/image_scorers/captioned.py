"""Scorer of images that describes them first."""

import hashlib
from collections.abc import Sequence

from PIL import Image

from cat_fast.complexity.captioners.base import MAX_SIDE, Captioner, DescriptionFailure, shrink
from cat_fast.complexity.description import Description
from cat_fast.complexity.image_score import GivenLabels, ImageScore
from cat_fast.complexity.score import Score, Scorer, ScoringFailure
from cat_fast.errors import UserError, one_line


class CaptionedScorer:
    """A captioner whose descriptions a scorer scores.

    Captions and flags that an image has already are kept. The captioner adds what is missing, and is not
    called for images with a complete description.
    """

    def __init__(self, captioner: Captioner, scorer: Scorer) -> None:
        self.captioner, self.scorer = captioner, scorer
        self.name = f"{captioner.name} + {scorer.name}"
        parts = (captioner.name, captioner.version, scorer.name, scorer.version)
        self.version = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return the image scaled down to what captioners use."""
        return shrink(image, MAX_SIDE)

    def score_images(
        self, images: Sequence[Image.Image], given: Sequence[GivenLabels]
    ) -> list[ImageScore | ScoringFailure]:
        """Describe and score each image, in order.

        Raises:
            UserError: the captioner or the scorer cannot be used at all.
        """
        described = self.describe(images, given)
        found = {i: d for i, d in enumerate(described) if isinstance(d, Description)}
        scores = dict(zip(found, self.scorer.score_many([*found.values()]) if found else [], strict=True))
        results: list[ImageScore | ScoringFailure] = []
        for i, description in enumerate(described):
            if isinstance(description, DescriptionFailure):
                results.append(ScoringFailure(f"not described: {description.error}"))
                continue
            score = scores[i]
            results.append(ImageScore(score, description) if isinstance(score, Score) else score)
        return results

    def describe(
        self, images: Sequence[Image.Image], given: Sequence[GivenLabels]
    ) -> list[Description | DescriptionFailure]:
        """Return the description of each image, in order, of which given parts are kept."""
        described: list[Description | DescriptionFailure | None] = [_complete(labels) for labels in given]
        left = [i for i, description in enumerate(described) if description is None]
        captions = [self._caption(given[i]) for i in left]
        found = self.captioner.describe_many([images[i] for i in left], captions) if left else []
        for i, description in zip(left, found, strict=True):
            described[i] = _with_given_flags(description, given[i])
        return [description for description in described if description is not None]

    def _caption(self, given: GivenLabels) -> str | None:
        """Return the known caption; that of a label only if the captioner writes none."""
        if given.caption or self.captioner.writes_captions or not given.label:
            return given.caption or None
        return Description.from_label(given.label).caption


def _complete(given: GivenLabels) -> Description | DescriptionFailure | None:
    """Return the description of an image whose caption and flags are all given, else None."""
    if not given.caption or given.has_text is None or given.has_faces is None:
        return None
    try:
        return Description(given.caption, given.has_text, given.has_faces)
    except UserError as error:
        return DescriptionFailure(one_line(error))


def _with_given_flags(
    found: Description | DescriptionFailure, given: GivenLabels
) -> Description | DescriptionFailure:
    if isinstance(found, DescriptionFailure):
        return found
    has_text = found.has_text if given.has_text is None else given.has_text
    has_faces = found.has_faces if given.has_faces is None else given.has_faces
    return Description(found.caption, has_text, has_faces)
