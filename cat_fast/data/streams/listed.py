"""Pictures in files of their own: an image index of any length, or a folder. A run of files is a shard."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cat_fast.data.image_index import parse_record
from cat_fast.data.images import find_images
from cat_fast.data.streams.shard import Entry, Labels, UnreadableShard, nothing
from cat_fast.errors import UserError

FILES_A_SHARD = 1024


class IndexShards:
    """Implements `ShardSet` for an image index (`ImageRecord`, JSON lines), which stays on the disk.

    What is held is the place of every `FILES_A_SHARD`-th line. Relative paths start at the index's folder.
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
                if lines % FILES_A_SHARD == 1:
                    self.starts.append(position)
                position += len(line)
        if not lines:
            raise UserError(f"image index {self.path}: it holds no pictures")
        self.starts.append(position)
        self.names = [
            f"{self.path.name}, lines from {1 + n * FILES_A_SHARD}" for n in range(len(self.starts) - 1)
        ]

    def open(self, index: int) -> "ListedShard":
        start, stop = self.starts[index : index + 2]
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                lines = file.read(stop - start).splitlines()
        except OSError as error:
            raise UnreadableShard(str(error)) from error
        before = index * FILES_A_SHARD
        return ListedShard(
            self.names[index], [self._entry(n, before + n + 1, line) for n, line in enumerate(lines)]
        )

    def labels(self, index: int) -> list[Labels] | None:
        return [entry.labels for entry in self.open(index).entries(0)]

    def _entry(self, number: int, line_number: int, line: bytes) -> Entry:
        try:
            record = parse_record(line, self.path, line_number)
            labels = Labels.of(vars(record))
        except UserError as error:
            return Entry(number, f"line {line_number}", Labels(), nothing, str(error))
        return Entry(number, record.key, labels, partial(_read, record.path))


class FolderShards:
    """Implements `ShardSet` for the pictures in a folder and its subfolders; nothing is known of them.

    What is held is their names within the folder, about a hundred bytes a picture.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"data.folder: {folder}: no such folder")
        self.files = [str(path.relative_to(self.folder)) for path in find_images([self.folder])]
        self.names = self.files[::FILES_A_SHARD]

    def open(self, index: int) -> "ListedShard":
        run = self.files[index * FILES_A_SHARD : (index + 1) * FILES_A_SHARD]
        entries = [Entry(n, name, Labels(), partial(_read, self.folder / name)) for n, name in enumerate(run)]
        return ListedShard(f"{self.folder.name}, from {self.names[index]}", entries)

    def labels(self, index: int) -> list[Labels] | None:
        return None


class ListedShard:
    """Implements `Shard` for a list of entries."""

    def __init__(self, name: str, entries: list[Entry]) -> None:
        self.name = name
        self._entries = entries

    def entries(self, first: int) -> Iterator[Entry]:
        return iter(self._entries[first:])


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except ValueError as error:  # no file can have this name
        raise OSError(str(error)) from error
