"""Pictures with their descriptions -> an image index with scores and ratios."""

from collections.abc import Sequence

from cat_fast.complexity.choose import Scorer, choose_ratios
from cat_fast.complexity.description import Description
from cat_fast.complexity.ratio import RatioThresholds
from cat_fast.data.image_index import ImageRecord, read_index
from cat_fast.data.photographs import Photograph, photographs

PHOTOGRAPHS = "photographs"


def index_photographs(
    pictures: Sequence[Photograph],
    scorer: Scorer | None = None,
    thresholds: RatioThresholds | None = None,
) -> list[ImageRecord]:
    """Score described pictures and choose their ratios, in order."""
    descriptions = [Description(p.caption, p.has_text, p.has_faces) for p in pictures]
    results = choose_ratios(descriptions, scorer, thresholds)
    return [
        ImageRecord(
            key=picture.key,
            path=str(picture.path),
            caption=picture.caption,
            has_text=picture.has_text,
            has_faces=picture.has_faces,
            category=picture.category,
            score=result.score,
            ratio=result.ratio,
        )
        for picture, result in zip(pictures, results, strict=True)
    ]


def load_index(name: str) -> list[ImageRecord]:
    """The image index file `name`, or with the name `photographs` the training pictures that ship.

    Raises:
        UserError: no such file, or one that is no index.
    """
    return index_photographs(photographs("train")) if name == PHOTOGRAPHS else read_index(name)
