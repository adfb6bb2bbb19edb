"""Images in separate files, from an image index of any length or a folder; consecutive files form a shard.

The `extent` of a set grows with its number of images, which the names of its shards do not determine.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from cat_fast.data.images.caption_file import read_caption
from cat_fast.data.images.index import ImageRecord, parse_record
from cat_fast.data.images.io import find_images
from cat_fast.data.streams.formats.base import Entry, Labels, UnreadableShard, fingerprint_of, no_image
from cat_fast.errors import UserError

FILES_PER_SHARD = 1024


class IndexShards:
    """`ShardSet` of an image index (`ImageRecord`, JSON lines) that stays on disk.

    Only the offset of every `FILES_PER_SHARD`-th line is held in memory. Paths are relative to the index's
    folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"image index {self.path}: no such file")
        self.starts: list[int] = []
        lines = 0
        with self.path.open("rb") as file:
            position = 0
            for lines, line in enumerate(file, start=1):
                if lines % FILES_PER_SHARD == 1:
                    self.starts.append(position)
                position += len(line)
        if not lines:
            raise UserError(f"image index {self.path} contains no images")
        self.starts.append(position)
        self.extent = position
        self.names = [
            f"{self.path.name}, lines from {1 + n * FILES_PER_SHARD}" for n in range(len(self.starts) - 1)
        ]
        self.fingerprint = fingerprint_of(self.names)

    def open(self, index: int) -> "ListedShard":
        start, stop = self.starts[index : index + 2]
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                lines = file.read(stop - start).splitlines()
        except OSError as error:
            raise UnreadableShard(str(error)) from error
        before = index * FILES_PER_SHARD
        return ListedShard(
            self.names[index], [self._entry(n, before + n + 1, line) for n, line in enumerate(lines)]
        )

    def labels(self, index: int) -> list[Labels] | None:
        return [entry.labels for entry in self.open(index).entries(0)]

    def _entry(self, number: int, line_number: int, line: bytes) -> Entry:
        try:
            record = parse_record(line, self.path, line_number)
            return _entry_of(number, record, record.ratio)
        except UserError as error:
            return Entry(number, f"line {line_number}", Labels(), no_image, str(error))


class RecordShards:
    """`ShardSet` of image records in memory; the fingerprint covers file names and ratios of all images.

    Args:
        ratios: ratios that replace those of the records.
    """

    def __init__(self, records: Sequence[ImageRecord], ratios: Sequence[int | None] | None = None) -> None:
        self.records = records
        self.ratios = [record.ratio for record in records] if ratios is None else ratios
        self.extent = len(records)
        self.names = [f"images from {n}" for n in range(0, len(records), FILES_PER_SHARD)]
        self.fingerprint = fingerprint_of(
            f"{record.path} {ratio}" for record, ratio in zip(records, self.ratios, strict=True)
        )

    def open(self, index: int) -> "ListedShard":
        run = slice(index * FILES_PER_SHARD, (index + 1) * FILES_PER_SHARD)
        pairs = zip(self.records[run], self.ratios[run], strict=True)
        entries = [_entry_of(n, record, ratio) for n, (record, ratio) in enumerate(pairs)]
        return ListedShard(self.names[index], entries)

    def labels(self, index: int) -> list[Labels] | None:
        return [entry.labels for entry in self.open(index).entries(0)]


class FolderShards:
    """`ShardSet` of the images in a folder and its subfolders.

    Images have no labels, unless `described`: then the subfolder is the class, and a text file next to the
    image contains the caption (`read_caption`). Relative paths are held in memory, about a hundred bytes
    per image.
    """

    def __init__(self, folder: str | Path, described: bool = False) -> None:
        self.folder, self.described = Path(folder), described
        if not self.folder.is_dir():
            raise UserError(f"data.folder: {folder}: no such folder")
        self.files = [str(path.relative_to(self.folder)) for path in find_images([self.folder])]
        self.extent = len(self.files)
        self.names = self.files[::FILES_PER_SHARD]
        self.fingerprint = fingerprint_of(self.names)

    def open(self, index: int) -> "ListedShard":
        entries = [self._entry(n, name) for n, name in enumerate(self._run(index))]
        return ListedShard(f"{self.folder.name}, from {self.names[index]}", entries)

    def labels(self, index: int) -> list[Labels] | None:
        """Return the classes if `described`; captions are left out, since reading them opens every file."""
        if not self.described:
            return None
        return [Labels(category=_first_folder(name)) for name in self._run(index)]

    def _run(self, index: int) -> list[str]:
        return self.files[index * FILES_PER_SHARD : (index + 1) * FILES_PER_SHARD]

    def _entry(self, number: int, name: str) -> Entry:
        path, labels = self.folder / name, Labels()
        if self.described:
            try:
                labels = Labels(caption=read_caption(path), category=_first_folder(name))
            except UserError as error:
                return Entry(number, name, labels, no_image, str(error))
        return Entry(number, name, labels, partial(read_file, path), path=str(path))


class ListedShard:
    """`Shard` of a list of entries."""

    def __init__(self, name: str, entries: list[Entry]) -> None:
        self.name = name
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self, first: int) -> Iterator[Entry]:
        return iter(self._entries[first:])


def _entry_of(number: int, record: ImageRecord, ratio: int | None) -> Entry:
    labels = Labels.of(vars(record) | {"ratio": ratio})
    return Entry(number, record.key, labels, partial(read_file, record.path), path=record.path)


def _first_folder(name: str) -> str:
    folder, inside, _ = name.partition("/")
    return folder if inside else ""


def read_file(path: str | Path) -> bytes:
    """Return the content of an image file; raise OSError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except ValueError as error:  # not a valid file name
        raise OSError(str(error)) from error
