"""Samples to score, and the files that they are read from, one at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cat_fast.complexity.captions import describe
from cat_fast.complexity.description import Description
from cat_fast.complexity.image_score import GivenLabels
from cat_fast.data.images.caption_file import read_caption
from cat_fast.data.images.label_fields import required_text
from cat_fast.data.input_samples import hash_content, hash_labels
from cat_fast.data.streams.formats.base import Entry, Labels, ShardSet, UnreadableShard
from cat_fast.data.streams.formats.image_files import FolderShards
from cat_fast.data.text_files import byte_lines, decode_text, escape_text, parse_object, strip_text
from cat_fast.errors import UserError

KEY_FIELDS = ("key", "__key__", "id", "path")
"""Fields that may contain the key of a row, in order of precedence."""
MakeDescription = Callable[[str, bool | None, bool | None], Description]


@dataclass(frozen=True, slots=True)
class GivenImage:
    """An encoded image with the labels that it has already."""

    read: Callable[[], bytes]
    """Returns the encoded image; raises OSError if it cannot be read."""
    given: GivenLabels

    def identity(self, content: bytes) -> str:
        """Return the hash of the image and its labels, which a scored row repeats."""
        labels = self.given
        given = Labels(None, None, labels.has_text, labels.has_faces, labels.caption, labels.label)
        return hash_labels(hash_content(content), given)

    def read_identity(self) -> str | None:
        """Read the image and return its identity; None if it cannot be read."""
        try:
            return self.identity(self.read())
        except OSError:
            return None


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a set of captions or images."""

    key: str
    description: Description | None
    """None if there is no valid one, and for an image, which is yet to be described."""
    error: str | None = None
    """Reason why it cannot be scored; None if it can."""
    image: GivenImage | None = None
    """The image if images are scored; None for a caption."""

    @property
    def identity(self) -> tuple[str, str | None, bool | None, bool | None]:
        """Key, caption and flags, which the row of a scored caption repeats."""
        d = self.description
        return (self.key, d.caption, d.has_text, d.has_faces) if d else (self.key, None, None, None)

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row is of this sample; reads its image, if there is one to score."""
        if row["key"] != self.key:
            return False
        if self.image is not None and self.error is None:
            return row["source"] is not None and row["source"] == self.image.read_identity()
        given = (row["key"], row["caption"], row["has_text"], row["has_faces"])
        return row["source"] is None and self.identity == given


@dataclass(frozen=True)
class Flags:
    """Flags of samples without their own; None if unknown."""

    has_text: bool | None = None
    has_faces: bool | None = None


class UnusableInput(Exception):
    """Raised for an input that cannot be read, or not to its end; the message is the reason."""


class Input(Protocol):
    """Numbered samples in a fixed order."""

    name: str
    """Name in messages, in generated keys and in the output."""

    def count(self) -> int | None:
        """Return the number of samples, or None if that requires reading all; may be too high."""
        ...

    def samples(self) -> Iterator[Sample]:
        """Yield the samples.

        Raises:
            UnusableInput: after the samples that could be read.
        """
        ...


class GivenTexts:
    """`Input` of texts in memory, such as captions and labels of the command line.

    Args:
        make: makes the description of a text with flags: `Description`, or `Description.from_label`.
    """

    def __init__(
        self, name: str, texts: Sequence[str], flags: Flags, make: MakeDescription = Description
    ) -> None:
        self.name, self.texts, self.flags, self.make = name, texts, flags, make

    def count(self) -> int:
        return len(self.texts)

    def samples(self) -> Iterator[Sample]:
        for number, text in enumerate(self.texts, start=1):
            yield _sample(f"{self.name}-{number}", text, self.flags, self.make)


class TextLines:
    """`Input` of a text file with one caption per line."""

    def __init__(self, name: str, path: Path, flags: Flags) -> None:
        self.name, self.path, self.flags = name, path, flags

    def count(self) -> int | None:
        return _count_lines(self.path)

    def samples(self) -> Iterator[Sample]:
        for number, line in _lines(self.path):
            key = f"{self.name}:{number}"
            try:
                caption = strip_text(decode_text(line))
            except ValueError as error:
                yield Sample(key, None, f"line {number}: {error}")
            else:
                yield _sample(key, caption, self.flags)


class JsonLines:
    """`Input` of JSON lines with "caption" and optionally "has_text", "has_faces" and a key."""

    def __init__(self, name: str, path: Path, flags: Flags) -> None:
        self.name, self.path, self.flags = name, path, flags

    def count(self) -> int | None:
        return _count_lines(self.path)

    def samples(self) -> Iterator[Sample]:
        for number, line in _lines(self.path):
            key, place = f"{self.name}:{number}", f"line {number}"
            try:
                row = parse_object(line)
            except ValueError as error:
                yield Sample(key, None, f'{place}: {error}; expected an object such as {{"caption": "..."}}')
            else:
                yield _sample_of_row(row, key, place, self.flags)


class ParquetRows:
    """`Input` of a parquet file with a column "caption", and the other fields of `JsonLines`."""

    def __init__(self, name: str, path: Path, flags: Flags) -> None:
        self.name, self.path, self.flags = name, path, flags

    def count(self) -> int | None:
        import pyarrow.parquet  # takes a second, and most inputs do not need it

        try:
            return pyarrow.parquet.read_metadata(self.path).num_rows
        except (OSError, pyarrow.ArrowException):
            return None

    def samples(self) -> Iterator[Sample]:
        from cat_fast.data.images.label_table import label_columns, label_rows

        try:
            columns = label_columns(self.path)
            if "caption" not in columns:
                raise UnusableInput(f"expected a column caption, got {', '.join(columns)}")
            for number, row in enumerate(label_rows(self.path, KEY_FIELDS)):
                yield _sample_of_row(row, f"{self.name}:{number}", f"row {number}", self.flags)
        except OSError as error:
            raise UnusableInput(_reason(error)) from error


class Archive:
    """`Input` of a webdataset archive: captions in .txt or .json members, or in the sidecar.

    Args:
        prefix: precedes the keys.
    """

    def __init__(self, name: str, shards: ShardSet, index: int, flags: Flags, prefix: str = "") -> None:
        self.name, self.shards, self.index, self.flags = name, shards, index, flags
        self.prefix = prefix
        self._opened: int | None = None

    def count(self) -> int | None:
        return self._opened

    def samples(self) -> Iterator[Sample]:
        try:
            entries = list(self.shards.open(self.index).entries(0))
        except UnreadableShard as error:
            raise UnusableInput(f"cannot be opened ({error})") from error
        self._opened = len(entries)
        if not any(entry.labels.caption for entry in entries):
            raise UnusableInput(
                "its images have no captions; expected KEY.txt, a caption in KEY.json, or a sidecar"
                " NAME.scores.jsonl"
            )
        for entry in entries:
            yield _sample_of_entry(entry, self.prefix, self.flags, "KEY.txt, KEY.json or the sidecar")


class ImageFolder:
    """`Input` of a folder of images with a text file next to each.

    Args:
        prefix: precedes the keys, which are paths relative to the folder.
    """

    def __init__(self, name: str, images: FolderShards, flags: Flags, prefix: str = "") -> None:
        self.name, self.images, self.flags, self.prefix = name, images, flags, prefix

    def count(self) -> int:
        return len(self.images.files)

    def samples(self) -> Iterator[Sample]:
        for index in range(len(self.images.names)):
            for entry in self.images.open(index).entries(0):
                yield _sample_of_entry(entry, self.prefix, self.flags, "a .txt file next to it")


class ImageFiles:
    """`Input` of single images with a text file next to each.

    Args:
        names: key of each image.
    """

    def __init__(self, name: str, paths: Sequence[Path], names: Sequence[str], flags: Flags) -> None:
        self.name, self.paths, self.names, self.flags = name, paths, names, flags

    def count(self) -> int:
        return len(self.paths)

    def samples(self) -> Iterator[Sample]:
        for path, name in zip(self.paths, self.names, strict=True):
            key = escape_text(name)
            try:
                caption = read_caption(path)
            except UserError as error:
                yield Sample(key, None, str(error))
                continue
            if not caption:
                yield Sample(key, None, f"the image has no caption; expected {path.with_suffix('.txt').name}")
            else:
                yield _sample(key, caption, self.flags)


def has_captions(images: FolderShards) -> bool:
    """Return whether any image of a folder has a text file next to it."""
    return any(entry.labels.caption or entry.damage for entry in _entries(images))


def _entries(images: ShardSet) -> Iterable[Entry]:
    for index in range(len(images.names)):
        yield from images.open(index).entries(0)


def _sample(key: str, text: str, flags: Flags, make: MakeDescription = Description) -> Sample:
    try:
        return Sample(key, make(text, flags.has_text, flags.has_faces))
    except UserError as error:
        return Sample(key, None, str(error))


def _sample_of_row(row: dict[str, Any], default_key: str, place: str, flags: Flags) -> Sample:
    key = default_key
    try:
        field = next((field for field in KEY_FIELDS if row.get(field) is not None), None)
        key = escape_text(required_text(row, field)) if field else default_key
        return Sample(key, describe(row, place, flags.has_text, flags.has_faces))
    except UserError as error:  # of the description, with its place
        return Sample(key, None, str(error))
    except ValueError as error:
        return Sample(key, None, f"{place}: {error}")


def _sample_of_entry(entry: Entry, prefix: str, flags: Flags, expected: str) -> Sample:
    """Return the sample of an image; only its caption is needed, so damage of its pixels does not matter."""
    key, labels = escape_text(prefix + entry.key), entry.labels
    if not labels.caption:
        return Sample(key, None, entry.damage or f"the image has no caption; expected {expected}")
    has_text = flags.has_text if labels.has_text is None else labels.has_text
    has_faces = flags.has_faces if labels.has_faces is None else labels.has_faces
    return _sample(key, labels.caption, Flags(has_text, has_faces))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        for number, _, line in byte_lines(path):
            yield number, line
    except OSError as error:
        raise UnusableInput(_reason(error)) from error


def _count_lines(path: Path) -> int | None:
    try:
        return sum(1 for _ in byte_lines(path))
    except OSError:
        return None


def _reason(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"
