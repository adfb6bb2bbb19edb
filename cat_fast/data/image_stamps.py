"""Stamps of the files that hold the images of a shard, to notice changes without reading them."""

from collections.abc import Callable

from cat_fast.data.input_samples import file_stamp
from cat_fast.data.streams.formats.base import Entry, ShardSet
from cat_fast.data.streams.formats.tar import TarShards

Stamp = tuple[int | str | None, ...]
"""Size and modification time; None for both without a file."""


def image_stamps(images: ShardSet, index: int) -> Callable[[Entry], Stamp]:
    """Return a function that gives the stamp of an image's file; within an archive, that of the archive.

    Args:
        index: the shard of the images. An archive is stamped now: open it afterwards, so that a later change
            is noticed.

    Raises:
        UnreadableShard: the archive is missing or cannot be read.
    """
    if not isinstance(images, TarShards):
        return lambda entry: file_stamp(entry.path)
    archive: Stamp = tuple(images.remote.stamp(images.names[index]))
    return lambda entry: archive
