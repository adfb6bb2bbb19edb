"""Identity of the samples that a folder was made from, to notice changes when it is resumed.

    inputs.npy    one hash per input, in order: key and labels of a sample, or the name of a file or archive

Besides, the record of each shard that the folder contains has a `SampleRecord` per sample. The content of an
image is hashed while it is used. It is read again only if its size or modification time has changed since.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cat_fast.data.files import atomic_write
from cat_fast.data.streams.formats.base import Labels
from cat_fast.errors import UserError

LISTING = "inputs.npy"
NOT_READ = ""
_LABELS = attrgetter(*(name for name in Labels.__dataclass_fields__ if name != "expected"))


class SampleRecord(NamedTuple):
    """A sample as it was when it was used; a list in JSON."""

    key: str
    labels: str
    """`hash_labels` of it."""
    size: int | None
    """Size of its file in bytes; None without a file of its own."""
    modified: int | None
    """Modification time of its file in nanoseconds."""
    content: str | None
    """`hash_content` of its image; None if it could not be read, NOT_READ if it was skipped before."""
    skipped: str
    """Reason why it was skipped; empty if it was used."""


class CurrentSample(NamedTuple):
    """A sample as it is now."""

    key: str
    labels: str
    path: str | None
    """File of its image; None within an archive."""
    read: Callable[[], bytes]
    """Returns its image; raises OSError if it cannot be read."""


def hash_labels(key: str, labels: Labels) -> str:
    """Return a hash of a sample's key and labels, 16 hexadecimal digits."""
    expected = [] if labels.expected is None else [labels.expected]  # keeps hashes of labels without it
    return _hash(json.dumps([key, *_LABELS(labels), *expected], default=asdict).encode(), 8)


def hash_content(content: bytes) -> str:
    """Return a hash of an image, 32 hexadecimal digits."""
    return _hash(content, 16)


def hash_name(name: str) -> str:
    """Return a hash of the name of a file or archive, 16 hexadecimal digits."""
    return _hash(name.encode(errors="surrogatepass"), 8)


def file_stamp(path: str | None) -> tuple[int, int] | tuple[None, None]:
    """Return size and modification time of a file; None for both without a file."""
    try:
        status = os.stat(path or "")
    except (OSError, ValueError):
        return None, None
    return status.st_size, status.st_mtime_ns


def compare(
    before: SampleRecord, now: CurrentSample, archive_changed: bool = False
) -> tuple[str, SampleRecord]:
    """Compare a sample with its record.

    Args:
        archive_changed: the archive of a sample without a file of its own has changed.

    Returns:
        How it differs, empty if it does not, and the record with the current size and modification time.
    """
    if (now.key, now.labels) != (before.key, before.labels):
        return "its labels differ" if now.key == before.key else f"it was {before.key!r}", before
    if before.content == NOT_READ:
        return ("it may be usable now" if archive_changed else ""), before
    size, modified = file_stamp(now.path)
    unchanged = (size, modified) == (before.size, before.modified) and not archive_changed
    if unchanged and (before.content is not None or size is None):
        return "", before
    try:
        content = hash_content(now.read())
    except OSError as error:
        return (f"its image cannot be read ({_reason(error)})" if before.content else ""), before
    if content != before.content:
        return ("its image differs" if before.content else "its image can be read now"), before
    return "", before._replace(size=size, modified=modified)


def changed_inputs(folder: Path, what: str) -> UserError:
    """Return the error for a folder that was started with other inputs."""
    return UserError(
        f"{folder} was started with other images: {what}; restore them, choose another folder, or delete "
        "this one"
    )


class Listing:
    """The inputs that a folder was started with, compared with others in order.

    Args:
        folder: a folder with a listing (`claim_listing`).

    Raises:
        UserError: the listing cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._done, self._last = folder, 0, ""
        path = folder / LISTING
        try:
            self._before = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); choose another folder") from error

    def compare(self, hashes: Sequence[str], keys: Sequence[str]) -> None:
        """Compare the next inputs, given by `hash_labels` or `hash_name` and their names.

        Raises:
            UserError: they differ; names the first that does.
        """
        before, now = self._before[self._done : self._done + len(hashes)], _as_array(hashes)
        differing = np.flatnonzero(before != now[: len(before)])
        if len(differing):
            key = keys[int(differing[0])]
            raise changed_inputs(self.folder, f"{key!r} has other labels, or is another image")
        if len(now) > len(before):
            raise changed_inputs(self.folder, f"{keys[len(before)]!r} is new")
        self._done += len(hashes)
        self._last = keys[-1] if keys else self._last

    def finish(self) -> None:
        """Check that no more inputs were expected; raise UserError otherwise."""
        if missing := len(self._before) - self._done:
            raise changed_inputs(self.folder, f"{missing} are missing, after {self._last!r}")


def claim_listing(folder: Path, hashes: Iterable[str]) -> None:
    """Store the inputs that a folder is started with, unless another process has."""
    with atomic_write(folder / LISTING, keep=True) as part, part.open("wb") as file:
        np.save(file, _as_array(hashes), allow_pickle=False)


def _as_array(hashes: Iterable[str]) -> np.ndarray:
    return np.fromiter((int(value, 16) for value in hashes), dtype=np.uint64)


def _hash(content: bytes, size: int) -> str:
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
