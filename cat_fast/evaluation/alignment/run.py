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
    """Return the mean score by each scorer, as JSON. Images that cannot be read are left out and listed.

    Args:
        seed: of the bootstrap.

    Raises:
        UserError: no image can be read, or two scorers have one name.
    """
    names = [scorer.name for scorer in scorers]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--scorer: {repeated[0]} is given twice; score with one weight file at a time")
    scores: dict[str, list[float]] = {scorer.name: [] for scorer in scorers}
    left_out: dict[str, str] = {}
    for start in range(0, len(images), batch_size):
        opened, captions = [], []
        for one in images[start : start + batch_size]:
            try:
                opened.append(load_image(one.file))
                captions.append(one.caption)
            except UserError as error:
                left_out[str(one.file)] = str(error)
            on_done(1)
        for scorer in scorers if opened else ():
            scores[scorer.name] += scorer.score(opened, captions)
    if len(left_out) == len(images):
        raise UserError(f"no image can be read: {next(iter(left_out.values()))}")
    found = {}
    for name, values in scores.items():
        estimate = mean_interval(values, seed)
        assert estimate is not None  # an image was read
        found[name] = {"value": estimate.value, "interval": [estimate.low, estimate.high]}
    return {
        "evaluation": "alignment",
        "images": len(images) - len(left_out),
        "left_out": left_out,
        "metrics": found,
        "scores": scores,
    }
