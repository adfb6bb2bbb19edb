"""Common interface of all shard formats: numbered samples in a fixed order."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cat_fast.data.images.label_fields import given_labels
from cat_fast.data.ratio_origin import ScoredBy

ARCHIVE_SUFFIXES = (
    *(".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"),
    *(".tgz", ".tbz", ".tbz2", ".txz", ".tzst"),
)


class UnreadableShard(Exception):
    """Raised for a shard that cannot be opened after all attempts."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of an image, from a sidecar, an index or the sample itself."""

    score: int | None = None
    ratio: int | None = None
    has_text: bool | None = None
    has_faces: bool | None = None
    caption: str = ""
    category: str = ""
    """Class: a name, or a number as text."""
    scored_by: ScoredBy | None = None
    """Scorer of the score, and the thresholds that chose the ratio; None if not recorded."""
    expected: float | None = None
    """Expected value of the score before rounding."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Labels":
        """Return the labels of a JSON object or table row (`given_labels`).

        Raises:
            ValueError: a label is not valid.
        """
        return cls(**given_labels(fields))


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample of a shard."""

    number: int
    """Index within the shard, unusable samples included."""
    key: str
    labels: Labels
    read: Callable[[], bytes]
    """Returns the encoded image; raises OSError if it cannot be read."""
    damage: str = ""
    """Reason why the sample is unusable: no image, or (once rated) no ratio; empty if usable."""
    ratio: int | None = None
    """Set when the sample is rated; None if it has no ratio or needs none."""
    path: str | None = None
    """File of the image; None within an archive."""


class Shard(Protocol):
    """An open shard; safe to read from several threads."""

    name: str

    def entries(self, first: int) -> Iterator[Entry]:
        """Yield the samples from number `first`."""
        ...


class ShardSet(Protocol):
    """All shards of a data set, in the same order on all ranks."""

    names: list[str]
    fingerprint: str
    """Hash of the data set's identity (`fingerprint_of`), which a resumed run compares."""
    extent: int
    """Number of images, if the names of the shards do not determine it; else the number of shards. A resumed
    run compares it, too."""

    def open(self, index: int) -> Shard:
        """Open a shard.

        Raises:
            UnreadableShard: it cannot be opened after all attempts.
        """
        ...

    def labels(self, index: int) -> list[Labels] | None:
        """Return the labels of all samples without reading images; None if the format does not allow it."""
        ...


@dataclass(frozen=True)
class Rating:
    """Rule that gives an image its ratio: from its labels, or else from its file content.

    Args:
        by_labels: returns the ratio given by labels, or None.
        by_bytes: returns the ratio of an encoded image without a labelled one. It runs in a worker, so it
            must be picklable, and raises UserError for invalid images. None skips images without a labelled
            ratio.
    """

    by_labels: Callable[[Labels], int | None]
    by_bytes: Callable[[bytes], int] | None = None


def fingerprint_of(names: Iterable[str]) -> str:
    """Return a hash of the file names of paths or URLs, in order; moving the data set does not change it."""
    # File names may contain any bytes; Python represents invalid ones as lone surrogates.
    parts = "\n".join(name.rpartition("/")[2] for name in names)
    return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()[:16]


def no_image() -> bytes:
    """Serve as `read` of an entry without an image: raise OSError."""
    raise OSError("the sample has no image")
