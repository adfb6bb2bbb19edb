"""What every kind of shard looks like to those who read it: numbered samples, in an order that stays."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cat_fast.data.images.index import whole_number


class UnreadableShard(Exception):
    """A shard that could not be opened, after all attempts."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What a sidecar, an index or the sample itself says of an image."""

    score: int | None = None
    ratio: int | None = None
    has_text: bool = False
    has_faces: bool = False
    caption: str = ""
    category: str = ""
    """Its class: a name, or a number as text."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Labels":
        """From JSON or a row of a table, whose other fields are nobody's business here.

        Raises:
            ValueError: a score or ratio that is no whole number.
        """
        return cls(
            score=whole_number(fields.get("score")),
            ratio=whole_number(fields.get("ratio")),
            has_text=bool(fields.get("has_text")),
            has_faces=bool(fields.get("has_faces")),
            caption=_text(fields.get("caption")),
            category=_text(fields.get("category")),
        )


LABELS = tuple(Labels.__dataclass_fields__)
"""Their names."""


def labels_said(row: Mapping[str, Any]) -> dict[str, Any]:
    """The labels that JSON or a row of a table says anything of: what is missing or null is left out.

    Raises:
        ValueError: a score or ratio that is no whole number.
    """
    Labels.of(row)
    return {name: row[name] for name in LABELS if row.get(name) is not None}


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample of a shard."""

    number: int
    """Its place in the shard, counting the unusable."""
    key: str
    labels: Labels
    read: Callable[[], bytes]
    """The encoded image; OSError where it cannot be read."""
    damage: str = ""
    """Why there is no image here, if there is none; once rated, also why it has no ratio."""
    ratio: int | None = None
    """Set by rating it; None if it has none, or needs none."""


class Shard(Protocol):
    """An opened shard; several threads may read it at once."""

    name: str

    def entries(self, first: int) -> Iterator[Entry]:
        """Its samples from number `first` on."""
        ...


class ShardSet(Protocol):
    """All shards of a data set, in one order that every rank knows."""

    names: list[str]
    fingerprint: str
    """A hash of what a resumed run has to find again (`fingerprint_of`)."""

    def open(self, index: int) -> Shard:
        """Raises UnreadableShard."""
        ...

    def labels(self, index: int) -> list[Labels] | None:
        """Those of all samples, without the images; None where they can only be had together."""
        ...


@dataclass(frozen=True)
class Rating:
    """How an image gets its ratio: from its labels, or by judging its bytes.

    Args:
        by_labels: the ratio that labels say, None where they say nothing.
        by_bytes: judges a file's bytes, in a worker (so it can be pickled); None leaves such images out.
            It raises UserError for what is no image.
    """

    by_labels: Callable[[Labels], int | None]
    by_bytes: Callable[[bytes], int] | None = None


def fingerprint_of(names: Iterable[str]) -> str:
    """Return a hash of the last parts of paths or URLs, in order: a set that has moved is the same set."""
    # Those of files may be any bytes, which Python holds as lone surrogates.
    parts = "\n".join(name.rpartition("/")[2] for name in names)
    return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()[:16]


def nothing() -> bytes:
    """The image of an entry that has none."""
    raise OSError("there is no image")


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
