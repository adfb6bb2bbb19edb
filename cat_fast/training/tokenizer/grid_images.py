"""Selection of images for grids and evaluations: held-out images, or training images if there are none."""

from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

from PIL.Image import Image

from cat_fast.complexity.ratios.image_ratios import PHOTOGRAPHS
from cat_fast.data.images.index import read_index
from cat_fast.data.images.io import decode_image, find_images, load_image
from cat_fast.data.photographs import CATEGORIES, photographs
from cat_fast.data.streams.formats.base import ShardSet, UnreadableShard
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.held_out import HeldOut
from cat_fast.data.streams.plan import spread
from cat_fast.errors import UserError
from cat_fast.training.config.settings import ImageRun
from cat_fast.training.metrics.reconstruction_grid import GridImages
from cat_fast.training.tokenizer.image_source import make_held_out, open_shards

SHARDS_SEARCHED = 16
"""Number of shards to search for held-out images, spread over the dataset."""


def grid_images(config: ImageRun, count: int | None = None) -> GridImages:
    """Read images of a run for grids and evaluations, the same ones at every step and after resuming.

    Args:
        count: maximum number of images; None for that of a grid.

    Raises:
        UserError: the images of `data.held_out` cannot be read, or no image of the run's data can.
    """
    data, count = config.data, count or config.logging.grid_columns
    if data.held_out:
        return GridImages([load_image(path) for path in _named(data.held_out)[:count]], held_out=True)
    if data.index == PHOTOGRAPHS and not data.stream_keys:
        return GridImages([load_image(path) for path in _shipped(count)], held_out=True)
    shards, held_out = open_shards(data, ProblemLog()), make_held_out(config)
    images = list(islice(_images(shards, held_out, SHARDS_SEARCHED, count), count)) if held_out else []
    if images:
        return GridImages(images, held_out=True)
    images = list(islice(_images(shards, None, count, count), count))
    if not images:
        raise UserError(
            "no image for grids and evaluations could be read from the first shards: set data.held_out to a "
            "folder of images, or set logging.grid_every_steps=0 and evaluation.every_steps=0"
        )
    return GridImages(images, held_out=False)


def _named(source: str) -> list[Path]:
    if source.endswith(".jsonl"):
        return [Path(record.path) for record in read_index(source)]
    return find_images([source])


def _shipped(count: int) -> list[Path]:
    """Return paths of held-out photographs: first one per category, then the others."""
    by_category = [[p for p in photographs("held_out") if p.category == c] for c in CATEGORIES]
    interleaved = [p for round_ in zip_longest(*by_category) for p in round_ if p is not None]
    return [photograph.path for photograph in interleaved[:count]]


def _images(shards: ShardSet, held_out: HeldOut | None, max_shards: int, count: int) -> Iterator[Image]:
    """Yield a few images per shard: held-out images only, or any if `held_out` is None."""
    chosen = spread(len(shards.names), max_shards)
    per_shard = -(-count // len(chosen))
    for index in chosen:
        try:
            yield from islice(_readable(shards, index, held_out), per_shard)
        except UnreadableShard:
            continue


def _readable(shards: ShardSet, index: int, held_out: HeldOut | None) -> Iterator[Image]:
    for entry in shards.open(index).entries(0):
        if entry.damage or (held_out is not None and entry.key not in held_out):
            continue
        try:
            yield decode_image(entry.read())
        except (OSError, UserError):
            continue
