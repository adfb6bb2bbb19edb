"""Images of a study."""

from cat_fast.complexity.ratios.image_ratios import PHOTOGRAPHS
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.photographs import photographs
from cat_fast.data.streams.formats.base import ShardSet
from cat_fast.data.streams.formats.image_files import RecordShards
from cat_fast.inference.encoding.shard_plan import open_images


def open_study_images(source: str) -> ShardSet:
    """Open a folder, an index, archives, or `photographs`: all packaged ones, also those held out.

    Raises:
        UserError: the source is missing or contains no images.
    """
    if source != PHOTOGRAPHS:
        return open_images(source)
    return RecordShards(
        [
            ImageRecord(
                key=photo.key,
                path=str(photo.path),
                caption=photo.caption,
                has_text=photo.has_text,
                has_faces=photo.has_faces,
                score=None,
                ratio=None,
            )
            for photo in photographs()
        ]
    )
