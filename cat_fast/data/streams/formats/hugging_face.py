"""Streamed Hugging Face datasets, from the Hub or from a local folder of parquet files or images.

A shard is a shard of `datasets`, such as a parquet file. It has no random access, and each ratio reads it
separately: convert a data set to archives if it is read over a network or more than once.
"""

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import fsspec

from cat_fast.data.images.label_fields import given_labels
from cat_fast.data.streams.formats.base import Entry, Labels, UnreadableShard, fingerprint_of, no_image
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.retries import Retries
from cat_fast.errors import UserError, one_line

KEY_COLUMNS = ("key", "__key__", "id")


class HubShards:
    """`ShardSet` of `datasets.load_dataset(path, name, split=split, streaming=True)`.

    Labels are read from the columns named like them (`LABELS`). An image column has the type Image, or is a
    struct of the same fields, bytes and path, as files written without the library have it.

    Args:
        image: image column, or a column of encoded images; needed only if there are several.

    Raises:
        UserError: the package `datasets` or the data set is missing, or it has no image column, or several
            and none is chosen.
    """

    def __init__(
        self,
        path: str,
        name: str,
        split: str,
        config: StreamConfig,
        problems: ProblemLog,
        image: str = "",
    ) -> None:
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
        images = {c for c, kind in features.items() if isinstance(kind, datasets.Image) or _is_file(kind)}
        self.column = _choose(path, image, features, images)
        if isinstance(features[self.column], datasets.Image):
            found = found.cast_column(self.column, datasets.Image(decode=False))
        self.dataset = found
        self.names = [f"{path}/{split}-{n:05d}" for n in range(found.num_shards)]
        self.fingerprint, self.extent = fingerprint_of(self.names), len(self.names)
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
        file = image if isinstance(image, dict) else {"bytes": image}
        content, path = file.get("bytes"), file.get("path")
        own = next((str(row[column]) for column in KEY_COLUMNS if row.get(column) is not None), None)
        key = own or f"{self.name.rpartition('/')[2]}-{number:08d}"
        try:
            given = given_labels(
                row, lambda label, why: self.parent.problems.report(f"{self.name}: {key}: {label}", why)
            )
        except ValueError as error:
            return Entry(number, key, Labels(), no_image, str(error))
        labels = Labels(**given)
        if content is not None:
            return Entry(number, key, labels, lambda: content)
        if path is not None:
            return Entry(number, key, labels, lambda: _read(path))
        return Entry(number, key, labels, no_image, "its row has no image")


def _is_file(kind: Any) -> bool:
    """Return whether a feature is a struct of bytes and path."""
    if not isinstance(kind, dict) or not {"bytes"} <= kind.keys() <= {"bytes", "path"}:
        return False
    return _is_binary(kind["bytes"])


def _is_binary(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _choose(path: str, wanted: str, features: Mapping[str, Any], images: Collection[str]) -> str:
    """Return the image column: the one wanted, else the only one."""
    usable = sorted({*images, *(column for column, kind in features.items() if _is_binary(kind))})
    if wanted in usable:
        return wanted
    if wanted:
        raise UserError(
            f"data.image: {path}: {wanted!r} is not an image column; expected one of {', '.join(usable)}"
        )
    if len(images) > 1:
        raise UserError(
            f"data.dataset: {path}: expected one image column, got {', '.join(sorted(images))}; choose "
            f"one with data.image={min(images)}"
        )
    if not images:
        advice = f"; data.image={usable[0]} reads encoded images from that column" if usable else ""
        raise UserError(f"data.dataset: {path}: expected an image column, got {', '.join(features)}{advice}")
    return next(iter(images))


def _read(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except OSError:
        raise
    except Exception as error:  # each file system has its own exceptions
        raise OSError(str(error)) from error
