"""Webdataset shards: tar archives of `KEY.jpg` (png, webp …) and `KEY.json`, with scores in sidecars.

As in webdataset, `KEY.txt` may hold the caption and `KEY.cls` the class. Each label is taken from the first
source that sets it: sidecar, JSON, then these files.
"""

import json
import os
from collections.abc import Iterator
from typing import IO, Any

from braceexpand import braceexpand
from webdataset.tariterators import base_plus_ext

from cat_fast.data.images.io import IMAGE_SUFFIXES
from cat_fast.data.streams.formats.base import (
    LABELS,
    Entry,
    Labels,
    UnreadableShard,
    fingerprint_of,
    given_labels,
    no_image,
)
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.sidecar import read_sidecar, sidecar_digest
from cat_fast.data.streams.formats.tar_index import Damage, Member, members
from cat_fast.errors import UserError

_NO_LABELS = Labels()
_TEXT_MEMBERS = {"txt": "caption", "cls": "category"}
"""Members whose content is a label."""
_SCORE_OR_RATIO = {"score", "ratio"}
"""Labels taken from the same source: a new score must not be combined with an old ratio."""


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


def _expand(part: str, remote: Remote) -> list[str]:
    try:
        urls = list(braceexpand(part))
    except ValueError as error:
        raise UserError(f"data.shards: {part}: {error}") from error
    found = []
    for url in urls:
        if url.endswith((".tar", ".tar.gz")) and "*" not in url:
            found.append(url)
            continue
        try:
            inside = remote.glob(url if "*" in url else f"{url.rstrip('/')}/*.tar")
        except (UnreadableShard, ValueError, ImportError) as error:
            raise UserError(f"data.shards: {url}: {error}") from error
        scheme = url.partition("://")[0] + "://" if "://" in url else ""
        found += sorted(scheme + hit.removeprefix(scheme) if scheme else hit for hit in inside)
    return found


class TarShards:
    """`ShardSet` of tar archives."""

    def __init__(self, names: list[str], remote: Remote, problems: ProblemLog) -> None:
        self.names, self.remote, self.problems = names, remote, problems
        self.fingerprint = fingerprint_of(names)

    def open(self, index: int) -> "TarShard":
        name = self.names[index]
        sidecar = read_sidecar(name, self.remote, self.problems)
        return TarShard(name, self.remote.open(name), sidecar, self.problems)

    def stamp(self, index: int) -> dict[str, Any]:
        """Return what changes with an archive or its sidecar, as JSON; the archive is not read.

        Raises:
            UnreadableShard: one of them cannot be read.
        """
        name = self.names[index]
        return {"file": self.remote.stamp(name), "sidecar": sidecar_digest(name, self.remote)}

    def labels(self, index: int) -> list[Labels] | None:
        sidecar = read_sidecar(self.names[index], self.remote, self.problems)
        return None if sidecar is None else [Labels.of(row) for row in sidecar.values()]

    def categories(self, index: int) -> set[str]:
        """Return the classes of a shard: from the sidecar if every row has one, else from the archive."""
        rows = (read_sidecar(self.names[index], self.remote, self.problems) or {}).values()
        if rows and all("category" in row for row in rows):
            return {Labels.of(row).category for row in rows}
        return {entry.labels.category for entry in self.open(index).entries(0)}


class TarShard:
    """`Shard` of one archive, scanned once for the offsets of its images.

    Labels come from the sidecar, or from the sample's own files where the sidecar does not set them.
    """

    def __init__(
        self, name: str, file: IO[bytes], sidecar: dict[str, dict[str, Any]] | None, problems: ProblemLog
    ) -> None:
        self.name, self.problems = name, problems
        self._file = file
        self._sidecar = sidecar or {}
        self._entries: list[Entry] = []
        for sample in _samples(file):
            self._entries.append(self._entry(len(self._entries), sample))
        if all(entry.damage for entry in self._entries):
            why = self._entries[0].damage if self._entries else "it is empty"
            raise UnreadableShard(f"the archive contains no image: {why}")
        if sidecar is not None:
            for key in sidecar.keys() - {entry.key for entry in self._entries}:
                problems.report(f"{name}: {key}", "it is in the sidecar, but not in the archive")
        del self._sidecar

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self, first: int) -> Iterator[Entry]:
        return iter(self._entries[first:])

    def _entry(self, number: int, sample: "Damage | tuple[str, dict[str, Member]]") -> Entry:
        if isinstance(sample, Damage):
            return Entry(number, sample.where, _NO_LABELS, no_image, sample.why)
        key, parts = sample
        labels = self._labels(key, parts)
        image = next((m for suffix, m in parts.items() if "." + suffix in IMAGE_SUFFIXES), None)
        if image is None:
            return Entry(number, key, labels, no_image, f"expected an image file, got {', '.join(parts)}")
        return Entry(number, key, labels, lambda: self._read(image))

    def _labels(self, key: str, parts: dict[str, Member]) -> Labels:
        """Return the labels of the sidecar, completed by those of the sample."""
        row = self._sidecar.get(key, {})
        own = self._own_labels(key, parts) if len(row) < len(LABELS) else {}
        if row.keys() & _SCORE_OR_RATIO:
            own = {name: value for name, value in own.items() if name not in _SCORE_OR_RATIO}
        return Labels.of(own | row)

    def _own_labels(self, key: str, parts: dict[str, Member]) -> dict[str, Any]:
        """Return the labels in a sample's JSON, text and class files."""
        own: dict[str, Any] = {}
        for suffix in [*_TEXT_MEMBERS, "json"]:
            if suffix not in parts:
                continue
            try:
                text = self._read(parts[suffix]).decode()
                own |= given_labels(json.loads(text)) if suffix == "json" else {_TEXT_MEMBERS[suffix]: text}
            except (ValueError, TypeError, AttributeError, OSError) as error:
                self.problems.report(f"{self.name}: {key}.{suffix}", str(error))
                return {}
        return own

    def _read(self, member: Member) -> bytes:
        content = os.pread(self._file.fileno(), member.size, member.offset)
        if len(content) != member.size:
            raise OSError(f"read {len(content)} of {member.size} bytes")
        return content


def _samples(file: IO[bytes]) -> Iterator[Damage | tuple[str, dict[str, Member]]]:
    """Group adjacent members by the part of their name before the first dot, as webdataset does."""
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
        if base is None:
            continue
        if base != key:
            if key is not None:
                yield key, parts
            key, parts = base, {}
        parts[suffix.lower()] = member
    if key is not None:
        yield key, parts
