"""Scores of captioned images, with 95 % intervals."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cat_fast.data.images.io import load_image
from cat_fast.errors import UserError
from cat_fast.evaluation.alignment.scorers import AlignmentScorer
from cat_fast.evaluation.intervals import mean_interval
from cat_fast.inference.encoding.photo_descriptions import PhotoDescriptions


class Captioned(NamedTuple):
    """An image file and its caption."""

    file: Path
    caption: str


def captioned_images(files: Sequence[Path], descriptions: PhotoDescriptions) -> list[Captioned]:
    """Return the images with their captions.

    Raises:
        UserError: an image has none.
    """
    found = []
    for file in files:
        description = descriptions.find(file)
        if description is None:
            raise UserError(f"{file}: has no caption; give --captions, or a text file next to the image")
        found.append(Captioned(file, description.caption))
    return found


def measure(
    images: Sequence[Captioned],
    scorers: Sequence[AlignmentScorer],
    batch_size: int = 8,
    seed: int = 0,
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Return the mean score by each scorer, as JSON.

    Args:
        seed: of the bootstrap.

    Raises:
        UserError: an image cannot be read.
    """
    scores: dict[str, list[float]] = {scorer.name: [] for scorer in scorers}
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        opened = [load_image(one.file) for one in batch]
        for scorer in scorers:
            scores[scorer.name] += scorer.score(opened, [one.caption for one in batch])
        on_done(len(batch))
    found = {}
    for name, values in scores.items():
        estimate = mean_interval(values, seed)
        assert estimate is not None  # there are images
        found[name] = {"value": estimate.value, "interval": [estimate.low, estimate.high]}
    return {"evaluation": "alignment", "images": len(images), "metrics": found, "scores": scores}
