"""Streamed Hugging Face datasets, from the Hub or from a local folder of parquet files or images.

A shard is a shard of `datasets`, such as a parquet file. It has no random access, and each ratio reads it
separately: convert a data set to archives if it is read over a network or more than once.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import fsspec

from cat_fast.data.streams.formats.base import Entry, Labels, UnreadableShard, fingerprint_of, no_image
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.retries import Retries
from cat_fast.errors import UserError, one_line

KEY_COLUMNS = ("key", "__key__", "id")


class HubShards:
    """`ShardSet` of `datasets.load_dataset(path, name, split=split, streaming=True)`.

    Images are read from the first column of type Image, labels from the columns named like them (`LABELS`).

    Raises:
        UserError: the package `datasets` or the data set is missing, or it has no image column.
    """

    def __init__(self, path: str, name: str, split: str, config: StreamConfig, problems: ProblemLog) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                "data.dataset: the package datasets is missing; install it with pip install 'cat-fast[data]'"
            ) from error
        try:
            found: Any = datasets.load_dataset(path, name or None, split=split, streaming=True)
            features = found.features or found._resolve_features().features or {}
        except Exception as error:  # the Hub, the network and file formats raise many types
            raise UserError(f"data.dataset: {path}: {one_line(error)}") from error
        images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        if not images:
            raise UserError(f"data.dataset: {path}: expected an image column, got {', '.join(features)}")
        self.column = images[0]
        self.dataset = found.cast_column(self.column, datasets.Image(decode=False))
        self.names = [f"{path}/{split}-{n:05d}" for n in range(found.num_shards)]
        self.fingerprint = fingerprint_of(self.names)
        self.config, self.problems = config, problems
        self.lock = threading.Lock()

    def open(self, index: int) -> "HubShard":
        return HubShard(self, index)

    def labels(self, index: int) -> list[Labels] | None:
        return None


class HubShard:
    """`Shard` of a Hugging Face dataset; each reader iterates separately."""

    def __init__(self, parent: HubShards, index: int) -> None:
        self.parent, self.index, self.name = parent, index, parent.names[index]
        try:
            self.rows(0)
        except Exception as error:
            raise UnreadableShard(str(error)) from error

    def rows(self, first: int) -> Iterable[Mapping[str, Any]]:
        """Return the rows from number `first`, as a new object: threads must not share an iterable."""
        with self.parent.lock:
            rows = self.parent.dataset.shard(num_shards=len(self.parent.names), index=self.index)
            return rows.skip(first) if first else rows

    def entries(self, first: int) -> Iterator[Entry]:
        """Yield the samples; resume after an error, and skip the rest of the shard after the last attempt."""
        number, retries = first, Retries(self.parent.config, self.parent.problems, self.name)
        while True:
            try:
                for row in self.rows(number):
                    yield self._entry(number, row)
                    number += 1
                    retries.succeeded()
                return
            except GeneratorExit:
                raise
            except Exception as error:
                if not retries.failed(why := one_line(error)):
                    yield Entry(number, f"all samples from {number}", Labels(), no_image, why)
                    return

    def _entry(self, number: int, row: Mapping[str, Any]) -> Entry:
        image = row[self.parent.column] or {}
        content, path = image.get("bytes"), image.get("path")
        own = next((str(row[column]) for column in KEY_COLUMNS if row.get(column) is not None), None)
        key = own or f"{self.name.rpartition('/')[2]}-{number:08d}"
        try:
            labels = Labels.of(row)
        except (ValueError, TypeError) as error:
            return Entry(number, key, Labels(), no_image, str(error))
        if content is not None:
            return Entry(number, key, labels, lambda: content)
        if path is not None:
            return Entry(number, key, labels, lambda: _read(path))
        return Entry(number, key, labels, no_image, "its row has no image")


def _read(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except OSError:
        raise
    except Exception as error:  # each file system has its own exceptions
        raise OSError(str(error)) from error
