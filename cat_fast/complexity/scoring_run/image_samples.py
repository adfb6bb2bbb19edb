"""Sets of images to score."""

from collections.abc import Iterable, Iterator

from cat_fast.complexity.image_score import GivenLabels
from cat_fast.complexity.scoring_run.samples import Flags, GivenImage, Sample, UnusableInput
from cat_fast.data.streams.formats.base import Entry, ShardSet, UnreadableShard
from cat_fast.data.text_files import escape_text
from cat_fast.errors import one_line


class ImageShards:
    """`Input` of images: a folder, an index, an archive, or single files.

    Args:
        shards: set of which the shards `indices` belong to this input.
        prefix: precedes the keys.
        count: number of images, if it is known without opening the shards.
    """

    def __init__(
        self,
        name: str,
        shards: ShardSet,
        flags: Flags,
        indices: Iterable[int] | None = None,
        prefix: str = "",
        count: int | None = None,
    ) -> None:
        self.name, self.shards, self.flags, self.prefix = name, shards, flags, prefix
        self.indices = range(len(shards.names)) if indices is None else [*indices]
        self._count = count

    def count(self) -> int | None:
        return self._count

    def samples(self) -> Iterator[Sample]:
        for index in self.indices:
            try:
                shard = self.shards.open(index)
            except UnreadableShard as error:
                raise UnusableInput(f"cannot be opened ({one_line(error)})") from error
            entries = shard.entries(0)
            if len(self.indices) == 1:
                listed = [*entries]
                self._count, entries = len(listed), iter(listed)
            for entry in entries:
                yield self._sample(entry)

    def _sample(self, entry: Entry) -> Sample:
        key, labels = escape_text(self.prefix + entry.key), entry.labels
        if entry.damage:
            return Sample(key, None, entry.damage)
        given = GivenLabels(
            labels.caption,
            self.flags.has_text if labels.has_text is None else labels.has_text,
            self.flags.has_faces if labels.has_faces is None else labels.has_faces,
            labels.category,
        )
        return Sample(key, None, image=GivenImage(entry.read, given))
