"""Check that a latent folder is resumed with the images that it was started with.

The list of inputs is compared in full: the rows of an image index, the file names of a folder, the names of
archives. So are the key and labels of each encoded sample. Its image is read only if the size or modification
time of its file or archive has changed.
"""

import logging
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cat_fast.data.files import write_json
from cat_fast.data.input_samples import (
    LISTING,
    CurrentSample,
    Listing,
    SampleRecord,
    changed_inputs,
    claim_listing,
    compare,
    hash_labels,
    hash_name,
)
from cat_fast.data.streams.formats.base import Entry, ShardSet, UnreadableShard
from cat_fast.data.streams.formats.image_files import FolderShards
from cat_fast.data.streams.formats.tar import TarShards
from cat_fast.errors import UserError
from cat_fast.inference.encoding.pieces import (
    complete_record,
    piece_path,
    recorded_pieces,
    split_pieces,
)

_LOG = logging.getLogger("cat_fast.data")


class InputCheck:
    """Comparison of an image set with the one that a latent folder was started with.

    Args:
        images: the image set.
        folder: the latent folder.
        per_shard: maximum number of latents per shard.
        shard_format: format of its shards.
    """

    def __init__(self, images: ShardSet, folder: Path, per_shard: int, shard_format: str) -> None:
        self.images, self.folder = images, folder
        self.per_shard, self.shard_format = per_shard, shard_format

    def check(self, inputs: Collection[int]) -> None:
        """Compare the list of inputs, and the samples of the input shards with these indices.

        A shard with a skipped sample that has changed loses its record, so that it is encoded again.

        Raises:
            UserError: the images have changed, and names the first sample that differs; or the image index
                cannot be read.
        """
        if not (self.folder / LISTING).is_file():
            return
        listing, pieces = Listing(self.folder), recorded_pieces(self.folder)
        if (names := self._names()) is not None:
            listing.compare(list(map(hash_name, names)), names)
            listing.finish()
        for index in range(len(self.images.names)):
            entries, hashes = None, None
            if names is None:
                entries = self._rows(index)
                hashes = list(map(_hash, entries))
                listing.compare(hashes, [entry.key for entry in entries])
            if index in inputs and index in pieces:
                self._check_input(index, pieces[index], entries, hashes)
        if names is None:
            listing.finish()

    def claim(self) -> None:
        """Store the list of inputs of a new folder, or compare it if another process has.

        Raises:
            UserError: see `check`.
        """
        if (self.folder / LISTING).is_file():
            return
        names = self._names()
        if names is not None:
            claim_listing(self.folder, map(hash_name, names))
        else:
            rows = map(self._rows, range(len(self.images.names)))
            claim_listing(self.folder, (_hash(entry) for entries in rows for entry in entries))
        self.check(())

    def _check_input(
        self,
        index: int,
        numbers: Sequence[int],
        entries: Sequence[Entry] | None,
        hashes: Sequence[str] | None,
    ) -> None:
        """Compare the samples of an input shard; entries and hashes are given if it has been opened.

        An archive that cannot be opened is not a changed one: encoding retries and reports it.
        """
        records = {number: complete_record(self._path(index, number)) for number in numbers}
        found = {number: record for number, record in records.items() if record is not None}
        try:
            archive = self.images.stamp(index) if isinstance(self.images, TarShards) else None
            if archive is not None and all(record["archive"] == archive for record in found.values()):
                return
            opened = self.images.open(index).entries(0) if entries is None else iter(entries)
        except UnreadableShard as error:
            name = self.images.names[index]
            _LOG.warning(
                "%s: %s cannot be opened (%s); its latents are not compared", self.folder, name, error
            )
            return
        last_key = ""
        for number, piece, last in split_pieces(opened, self.per_shard):
            last_key = piece[-1].key
            if (record := found.pop(number, None)) is not None:
                start = number * self.per_shard
                known = hashes[start : start + len(piece)] if hashes else list(map(_hash, piece))
                self._check_piece(self._path(index, number), record, piece, known, last, archive)
        if found:
            raise changed_inputs(self.folder, f"images after {last_key!r} are missing")

    def _check_piece(
        self,
        path: Path,
        record: dict[str, Any],
        piece: Sequence[Entry],
        hashes: Sequence[str],
        last: bool,
        archive: dict[str, Any] | None,
    ) -> None:
        archive_changed = archive is not None and record["archive"]["file"] != archive["file"]
        before = [SampleRecord(*values) for values in record["samples"]]
        now: list[SampleRecord] = []
        usable_now = False
        for sample, entry, labels in zip_longest(before, piece, hashes):
            if sample is None or entry is None:
                changed = f"{sample.key!r} is missing" if sample else f"{entry.key!r} is new"
                raise changed_inputs(self.folder, changed)
            current = CurrentSample(entry.key, labels, entry.path, entry.read)
            difference, compared = compare(sample, current, archive_changed)
            if difference and not sample.skipped:
                raise changed_inputs(self.folder, f"{entry.key!r}: {difference}")
            usable_now |= bool(difference)
            now.append(compared)
        if last != record["last"]:
            changed = "images are missing" if last else "there are more images"
            raise changed_inputs(self.folder, f"{changed} after {piece[-1].key!r}")
        if usable_now:
            path.with_suffix(".json").unlink()
        elif now != before or record["archive"] != archive:
            write_json(path.with_suffix(".json"), record | {"archive": archive, "samples": now})

    def _rows(self, index: int) -> list[Entry]:
        """Return the rows of an input shard of an image index.

        Raises:
            UserError: the index cannot be read.
        """
        try:
            return list(self.images.open(index).entries(0))
        except UnreadableShard as error:
            raise UserError(
                f"{self.images.names[index]}: cannot be read ({error}); run the command again once it can"
            ) from error

    def _path(self, index: int, number: int) -> Path:
        return piece_path(self.folder, index, number, self.shard_format)

    def _names(self) -> Sequence[str] | None:
        """Return the names of files or archives, which may have moved; None for rows of an index."""
        if isinstance(self.images, FolderShards):
            return self.images.files
        if isinstance(self.images, TarShards):
            return [name.rpartition("/")[2] for name in self.images.names]
        return None


def _hash(entry: Entry) -> str:
    return hash_labels(entry.key, entry.labels)
