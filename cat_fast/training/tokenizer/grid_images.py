"""The images that reconstruction grids show: held-out ones of the run's data, else some that it trains on."""

from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

from PIL.Image import Image

from cat_fast.complexity.image_ratios import PHOTOGRAPHS
from cat_fast.data.images.index import read_index
from cat_fast.data.images.io import decode_image, find_images, load_image
from cat_fast.data.photographs import CATEGORIES, photographs
from cat_fast.data.streams.formats.base import ShardSet, UnreadableShard
from cat_fast.data.streams.formats.problems import Problems
from cat_fast.data.streams.held_out import HeldOut
from cat_fast.data.streams.plan import spread
from cat_fast.errors import UserError
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.metrics.reconstruction_grid import GridImages
from cat_fast.training.tokenizer.image_source import held_out_of, open_shards

SHARDS_SEARCHED = 16
"""Shards in which held-out images are searched for, spread over the set."""


def grid_images(config: TokenizerRun) -> GridImages:
    """Read the images for the grids of a run: the same ones at each step and each start.

    Raises:
        UserError: the images that `data.held_out` names cannot be read, or none of the run's own.
    """
    data, count = config.data, config.logging.grid_columns
    if data.held_out:
        return GridImages([load_image(path) for path in _named(data.held_out)[:count]], held_out=True)
    if data.index == PHOTOGRAPHS and not data.streamed:
        return GridImages([load_image(path) for path in _shipped(count)], held_out=True)
    shards, held_out = open_shards(data, Problems()), held_out_of(config)
    images = list(islice(_images(shards, held_out, SHARDS_SEARCHED, count), count)) if held_out else []
    if images:
        return GridImages(images, held_out=True)
    images = list(islice(_images(shards, None, count, count), count))
    if not images:
        raise UserError(
            "logging.grid_every_steps: no image of the first shards can be read, and there is none to show: "
            "name held-out images as data.held_out, or set logging.grid_every_steps=0"
        )
    return GridImages(images, held_out=False)


def _named(source: str) -> list[Path]:
    if source.endswith(".jsonl"):
        return [Path(record.path) for record in read_index(source)]
    return find_images([source])


def _shipped(count: int) -> list[Path]:
    """The held-out photographs: first one of each category, then the others."""
    by_category = [[p for p in photographs("held_out") if p.category == c] for c in CATEGORIES]
    in_turn = [p for round_ in zip_longest(*by_category) for p in round_ if p is not None]
    return [photograph.path for photograph in in_turn[:count]]


def _images(shards: ShardSet, held_out: HeldOut | None, most_shards: int, count: int) -> Iterator[Image]:
    """Yield images, a few per shard: held-out ones, or with None any."""
    chosen = spread(len(shards.names), most_shards)
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
