"""Webdataset shards: tar archives of `KEY.jpg` (png, webp …) and `KEY.json`, with scores in sidecars.

As in webdataset, a key ends at the first dot, the files of a sample are adjacent, `KEY.txt` may hold the
caption and `KEY.cls` the class; extensions may have several parts (`KEY.input.jpg`). Each label is taken from
the first source that sets it: sidecar, JSON, then these files. Hidden files, as of macOS, are ignored.
"""

import os
import posixpath
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, Any

from braceexpand import braceexpand

from cat_fast.data.images.io import IMAGE_SUFFIXES
from cat_fast.data.images.label_fields import LABELS, given_labels
from cat_fast.data.streams.formats.base import (
    ARCHIVE_SUFFIXES,
    Entry,
    Labels,
    UnreadableShard,
    fingerprint_of,
    no_image,
)
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.sidecar import read_sidecar, sidecar_digest
from cat_fast.data.streams.formats.tar_index import Damage, Member, members
from cat_fast.data.text_files import decode_text, parse_object, strip_text, valid_text
from cat_fast.errors import UserError

_NO_LABELS = Labels()
_TEXT_MEMBERS = {"txt": "caption", "cls": "category"}
"""Members whose content is a label."""
_SCORE_OR_RATIO = {"score", "expected", "ratio", "scored_by"}
"""Labels taken from the same source: a new score must not be combined with an old ratio or another scorer."""


def list_shards(pattern: str, remote: Remote) -> list[str]:
    """Return the archives that a pattern names, in order.

    A pattern contains braces (`s3://b/shard-{000000..037999}.tar`), which are expanded without listing files,
    or wildcards, or is a folder. `::` joins several patterns.

    Raises:
        UserError: there are none, listing failed, or a shard is named twice.
    """
    found = [url for part in pattern.split("::") for url in _expand(part.strip(), remote)]
    if not found:
        raise UserError(f"data.shards: {pattern}: found no archive (.tar)")
    if all("://" not in url and not os.path.exists(url) for url in found):
        raise UserError(f"data.shards: {found[0]}: no such file; cat-fast shard creates shards from an index")
    if len(set(found)) < len(found):
        raise UserError(f"data.shards: {pattern}: names a shard twice; name each shard once")
    return found


def is_archive(path: str) -> bool:
    """Return whether a file in a folder is an archive, by its name; those of macOS (`._a.tar`) are not."""
    return path.lower().endswith(ARCHIVE_SUFFIXES) and not posixpath.basename(path).startswith(".")


def _expand(part: str, remote: Remote) -> list[str]:
    try:
        urls = list(braceexpand(part))
    except ValueError as error:
        raise UserError(f"data.shards: {part}: {error}") from error
    found = []
    for url in urls:
        if url.lower().endswith(ARCHIVE_SUFFIXES) and "*" not in url:
            found.append(url)
            continue
        try:
            hits = remote.glob(url if "*" in url else f"{url.rstrip('/')}/*")
        except (UnreadableShard, ValueError, ImportError) as error:
            raise UserError(f"data.shards: {url}: {error}") from error
        inside = [hit for hit in hits if "*" in url or is_archive(hit)]
        scheme = url.partition("://")[0] + "://" if "://" in url else ""
        found += sorted(scheme + hit.removeprefix(scheme) if scheme else hit for hit in inside)
    return found


class TarShards:
    """`ShardSet` of tar archives.

    Args:
        image: extension of the image in samples that contain several, such as "input.jpg".
    """

    def __init__(self, names: list[str], remote: Remote, problems: ProblemLog, image: str = "") -> None:
        self.names, self.remote, self.problems = names, remote, problems
        self.image = image.lower().lstrip(".")
        self.fingerprint, self.extent = fingerprint_of(names), len(names)

    def open(self, index: int) -> "TarShard":
        name = self.names[index]
        sidecar = read_sidecar(name, self.remote, self.problems)
        return TarShard(name, self.remote.open(name), sidecar, self.problems, self.image)

    def stamp(self, index: int) -> dict[str, Any]:
        """Return what changes with an archive or its sidecar, as JSON; the archive is not read.

        Raises:
            UnreadableShard: one of them cannot be read.
        """
        name = self.names[index]
        return {"file": self.remote.stamp(name), "sidecar": sidecar_digest(name, self.remote)}

    def labels(self, index: int) -> list[Labels] | None:
        sidecar = read_sidecar(self.names[index], self.remote, self.problems)
        return None if sidecar is None else [Labels(**row) for row in sidecar.values()]

    def categories(self, index: int) -> set[str]:
        """Return the classes of a shard: from the sidecar if every row has one, else from the archive."""
        rows = (read_sidecar(self.names[index], self.remote, self.problems) or {}).values()
        if rows and all("category" in row for row in rows):
            return {row["category"] for row in rows}
        return {entry.labels.category for entry in self.open(index).entries(0)}


class TarShard:
    """`Shard` of one archive, scanned once for the offsets of its images.

    Labels come from the sidecar, or from the sample's own files where the sidecar does not set them.
    """

    def __init__(
        self,
        name: str,
        file: IO[bytes],
        sidecar: dict[str, dict[str, Any]] | None,
        problems: ProblemLog,
        image: str = "",
    ) -> None:
        self.name, self.problems, self.image = name, problems, image
        self._file = file
        self._sidecar = sidecar or {}
        samples = list(_samples(file))
        self._with_image = {
            sample[0] for sample in samples if not isinstance(sample, Damage) and _images(sample[1])
        }
        self._entries = [self._entry(number, sample) for number, sample in enumerate(samples)]
        if all(entry.damage for entry in self._entries):
            why = self._entries[0].damage if self._entries else "it is empty"
            raise UnreadableShard(f"the archive contains no image: {why}")
        if sidecar is not None:
            for key in sidecar.keys() - {entry.key for entry in self._entries}:
                problems.report(f"{name}: {key}", "it is in the sidecar, but not in the archive")
        del self._sidecar, self._with_image

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self, first: int) -> Iterator[Entry]:
        return iter(self._entries[first:])

    def _entry(self, number: int, sample: "Damage | tuple[str, dict[str, Member]]") -> Entry:
        if isinstance(sample, Damage):
            return Entry(number, sample.where, _NO_LABELS, no_image, sample.why)
        key, parts = sample
        image = self._image(key, parts)
        if isinstance(image, str):
            return Entry(number, key, _NO_LABELS, no_image, image)
        return Entry(number, key, self._labels(key, parts), lambda: image.read(self._file), image.damage)

    def _image(self, key: str, parts: Mapping[str, Member]) -> Member | str:
        """Return the image of a sample, or the reason why there is none."""
        images = _images(parts)
        if self.image in parts:
            return parts[self.image]
        if not images and key in self._with_image:
            return (
                f"its labels ({', '.join(parts)}) are apart from its image, which is used without them; the "
                "files of a sample must be adjacent"
            )
        if self.image or not images:
            return f"expected {self.image or 'an image file'}, got {', '.join(parts)}"
        if len(images) > 1:
            return (
                f"{len(images)} images in one sample ({', '.join(images)}); a key ends at the first dot of a "
                f"file name: remove other dots, or choose the image by its extension, {next(iter(images))}"
            )
        return next(iter(images.values()))

    def _labels(self, key: str, parts: Mapping[str, Member]) -> Labels:
        """Return the labels of the sidecar, completed by those of the sample."""
        row = self._sidecar.get(key, {})
        missing = set(LABELS) - row.keys()
        if row.keys() & _SCORE_OR_RATIO:
            missing -= _SCORE_OR_RATIO
        own = self._own_labels(key, parts) if missing else {}
        return Labels(**({name: value for name, value in own.items() if name in missing} | row))

    def _own_labels(self, key: str, parts: Mapping[str, Member]) -> dict[str, Any]:
        """Return the labels in a sample's JSON, text and class files; report files that cannot be used."""
        own: dict[str, Any] = {}
        for suffix in [*_TEXT_MEMBERS, "json"]:
            files = _ending_in({suffix}, parts)
            where = f"{self.name}: {key}.{' and '.join(files)}"
            if len(files) > 1:
                self.problems.report(where, f"expected one .{suffix} file in a sample")
            if len(files) != 1:
                continue
            try:
                text = decode_text(next(iter(files.values())).read(self._file))
                if suffix == "json":
                    own |= given_labels(parse_object(text), self._reporter(where))
                else:
                    own[_TEXT_MEMBERS[suffix]] = strip_text(valid_text(text))
            except (ValueError, OSError) as error:
                self.problems.report(where, str(error))
        return own

    def _reporter(self, where: str) -> Callable[[str, str], None]:
        return lambda label, why: self.problems.report(f"{where}: {label}", why)


def _images(parts: Mapping[str, Member]) -> dict[str, Member]:
    return _ending_in({suffix[1:] for suffix in IMAGE_SUFFIXES}, parts)


def _ending_in(suffixes: Collection[str], parts: Mapping[str, Member]) -> dict[str, Member]:
    """Return the files with one of the extensions: `KEY.jpg`, or if there is none, `KEY.input.jpg`."""
    plain = {suffix: member for suffix, member in parts.items() if suffix in suffixes}
    return plain or {
        suffix: member for suffix, member in parts.items() if suffix.rpartition(".")[2] in suffixes
    }


def _samples(file: IO[bytes]) -> Iterator[Damage | tuple[str, dict[str, Member]]]:
    """Group adjacent members by the part of their name before the first dot, as webdataset does.

    A file name that repeats starts another sample with the same key.
    """
    from webdataset.tariterators import base_plus_ext  # imports torch

    key: str | None = None
    parts: dict[str, Member] = {}
    for member in members(file):
        if isinstance(member, Damage):
            if key is not None:
                yield key, parts
            key, parts = None, {}
            yield member
            continue
        base, suffix = base_plus_ext(member.name)
        if base is None or posixpath.basename(member.name).startswith("."):
            continue
        suffix = suffix.lower()
        if base != key or suffix in parts:
            if key is not None:
                yield key, parts
            key, parts = base, {}
        parts[suffix] = member
    if key is not None:
        yield key, parts
