"""Images in separate files, from an image index of any length or a folder; consecutive files form a shard."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from cat_fast.data.images.caption_file import read_caption
from cat_fast.data.images.index import ImageRecord, Scoring, index_lines, parse_record
from cat_fast.data.images.io import find_images
from cat_fast.data.streams.formats.base import Entry, Labels, UnreadableShard, fingerprint_of, no_image
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.text_files import is_blank
from cat_fast.errors import UserError

FILES_PER_SHARD = 1024


class IndexShards:
    """`ShardSet` of an image index (`ImageRecord`, JSON lines) that stays on disk.

    Only the place of every `FILES_PER_SHARD`-th image is held in memory. Paths are relative to the index's
    folder.

    Args:
        scoring: sets missing scores and ratios when a shard is opened.
    """

    def __init__(self, path: str | Path, problems: ProblemLog | None = None, scoring: Scoring = list) -> None:
        self.path, self.problems, self.scoring = Path(path), problems or ProblemLog(), scoring
        self.starts: list[tuple[int, int]] = []
        """Line number and offset in bytes of each shard."""
        self.extent = 0
        digest = hashlib.blake2b(digest_size=8)
        for image, (line, offset, content) in enumerate(index_lines(self.path)):
            digest.update(content.strip() + b"\n")
            if image % FILES_PER_SHARD == 0:
                self.starts.append((line, offset))
            self.extent = image + 1
        if not self.starts:
            raise UserError(f"image index {self.path} contains no images")
        self.contents = digest.hexdigest()
        """Hash of all lines."""
        self._end = self.path.stat().st_size
        self.names = [f"{self.path.name}, lines from {line}" for line, _ in self.starts]
        self.fingerprint = fingerprint_of(self.names)

    def open(self, index: int) -> "ListedShard":
        first, start = self.starts[index]
        stop = self.starts[index + 1][1] if index + 1 < len(self.starts) else self._end
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                lines = file.read(stop - start).split(b"\n")
        except OSError as error:
            raise UnreadableShard(str(error)) from error
        parsed = [
            (n, self._parse(line, n)) for n, line in enumerate(lines, start=first) if not is_blank(line)
        ]
        records = [record for _, record in parsed if isinstance(record, ImageRecord)]
        scored = iter(self.scoring(records))
        entries = [
            _invalid_line(number, line, record)
            if isinstance(record, UserError)
            else _entry_of(number, found := next(scored), found.ratio)
            for number, (line, record) in enumerate(parsed)
        ]
        return ListedShard(self.names[index], entries)

    def labels(self, index: int) -> list[Labels] | None:
        return [entry.labels for entry in self.open(index).entries(0)]

    def _parse(self, line: bytes, number: int) -> ImageRecord | UserError:
        try:
            return parse_record(line, self.path, number, self.problems.report)
        except UserError as error:
            return error


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

    Images have no labels, unless `described`: then the subfolder is the class, except for the numbered ones
    of img2dataset, and a text file next to the image contains the caption (`read_caption`). Relative paths
    are held in memory, about a hundred bytes per image.
    """

    def __init__(self, folder: str | Path, described: bool = False) -> None:
        self.folder, self.described = Path(folder), described
        if not self.folder.is_dir():
            raise UserError(f"data.folder: {folder}: no such folder")
        self.files = [str(path.relative_to(self.folder)) for path in find_images([self.folder])]
        self.extent = len(self.files)
        self.contents = _hash_names(self.files)
        """Hash of the relative paths of all files."""
        self.names = self.files[::FILES_PER_SHARD]
        self.fingerprint = fingerprint_of(self.names)
        self._not_classes = _download_folders(self.folder, self.files) if described else set()

    def open(self, index: int) -> "ListedShard":
        entries = [self._entry(n, name) for n, name in enumerate(self._run(index))]
        return ListedShard(f"{self.folder.name}, from {self.names[index]}", entries)

    def labels(self, index: int) -> list[Labels] | None:
        """Return the classes if `described`; captions are left out, since reading them opens every file."""
        if not self.described:
            return None
        return [Labels(category=self._category(name)) for name in self._run(index)]

    def _run(self, index: int) -> list[str]:
        return self.files[index * FILES_PER_SHARD : (index + 1) * FILES_PER_SHARD]

    def _category(self, name: str) -> str:
        first, inside, _ = name.partition("/")
        return first if inside and first not in self._not_classes else ""

    def _entry(self, number: int, name: str) -> Entry:
        path, labels = self.folder / name, Labels()
        if self.described:
            try:
                labels = Labels(caption=read_caption(path), category=self._category(name))
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


def _invalid_line(number: int, line: int, error: UserError) -> Entry:
    return Entry(number, f"line {line}", Labels(), no_image, str(error))


def _entry_of(number: int, record: ImageRecord, ratio: int | None) -> Entry:
    labels = Labels(
        score=record.score,
        ratio=ratio,
        has_text=record.has_text,
        has_faces=record.has_faces,
        caption=record.caption,
        category=record.category,
        scored_by=record.scored_by,
        expected=record.expected,
    )
    return Entry(number, record.key, labels, partial(read_file, record.path), path=record.path)


def _download_folders(folder: Path, files: Iterable[str]) -> set[str]:
    """Return the numbered subfolders of img2dataset, which are parts of a download and not classes.

    It writes `00012/000120345.jpg` and, when a part is complete, `00012_stats.json`.
    """
    numbered: dict[str, bool] = {}
    for file in files:
        first, inside, name = file.partition("/")
        if inside and first.isdecimal():
            stem = name.partition(".")[0]
            fits = len(first) >= 5 and stem.isdecimal() and stem.startswith(first) and len(stem) > len(first)
            numbered[first] = numbered.get(first, True) and fits
    return {name for name, fits in numbered.items() if fits or (folder / f"{name}_stats.json").is_file()}


def read_file(path: str | Path) -> bytes:
    """Return the content of an image file; raise OSError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except ValueError as error:  # not a valid file name
        raise OSError(str(error)) from error


def _hash_names(names: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        digest.update(f"{name}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()
