"""Scores and ratios of the images of an index."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cat_fast.complexity.choose import Scorer, choose_ratios
from cat_fast.complexity.description import Description
from cat_fast.complexity.ratio import RatioThresholds
from cat_fast.complexity.ratio_policy import Label, RatioPolicy, ratio_of_image
from cat_fast.data.images.index import ImageRecord, read_index
from cat_fast.data.images.io import load_image
from cat_fast.data.photographs import Photograph, photographs
from cat_fast.errors import UserError

PHOTOGRAPHS = "photographs"
RATIO_SIGNALS: dict[str, tuple[Label, ...]] = {"index": ("ratio",), "score": ("score",), "jpeg": ()}
"""Values of `data.ratios_from`, and the labels that each one uses."""


def index_photographs(
    images: Sequence[Photograph],
    scorer: Scorer | None = None,
    thresholds: RatioThresholds | None = None,
) -> list[ImageRecord]:
    """Return the index records of photographs, in order, with their scores and ratios."""
    descriptions = [Description(p.caption, p.has_text, p.has_faces) for p in images]
    results = choose_ratios(descriptions, scorer, thresholds)
    return [
        ImageRecord(
            key=image.key,
            path=str(image.path),
            caption=image.caption,
            has_text=image.has_text,
            has_faces=image.has_faces,
            category=image.category,
            score=result.score,
            ratio=result.ratio,
        )
        for image, result in zip(images, results, strict=True)
    ]


def load_index(name: str) -> list[ImageRecord]:
    """Read the image index file `name`; the name `photographs` stands for the packaged training images.

    Raises:
        UserError: the file is missing or is not a valid index.
    """
    return index_photographs(photographs("train")) if name == PHOTOGRAPHS else read_index(name)


def ratio_policy_for(signal: str, thresholds: RatioThresholds) -> RatioPolicy:
    """Return the policy for a key of RATIO_SIGNALS, with `thresholds` for scores."""
    return RatioPolicy(RATIO_SIGNALS[signal], thresholds)


def ratios_by_jpeg(records: Sequence[ImageRecord]) -> list[int | None]:
    """Return each image's ratio by its JPEG size, None for images that cannot be read."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_ratio_by_jpeg, (record.path for record in records)))


def _ratio_by_jpeg(path: str) -> int | None:
    try:
        return ratio_of_image(load_image(path))
    except UserError:
        return None
