"""Check that a latent folder is resumed with the images that it was started with.

The list of inputs is compared in full: the rows of an image index, the file names of a folder, the names of
archives. So are the key and labels of each encoded sample. Its image is read only if the size or modification
time of its file or archive has changed.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from cat_fast.data.files import write_json
from cat_fast.data.input_samples import (
    LISTING,
    CurrentSample,
    SampleRecord,
    changed_inputs,
    check_listing,
    claim_listing,
    compare,
    hash_labels,
    hash_name,
)
from cat_fast.data.streams.formats.base import Entry, ShardSet, UnreadableShard
from cat_fast.data.streams.formats.image_files import FolderShards
from cat_fast.data.streams.formats.tar import TarShards
from cat_fast.inference.encoding.pieces import (
    complete_record,
    piece_path,
    recorded_pieces,
    split_pieces,
)


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
        self._listing: list[str] | None = None

    def check(self, inputs: Collection[int]) -> None:
        """Compare the list of inputs, and the samples of the input shards with these indices.

        A shard with a skipped sample that has changed loses its record, so that it is encoded again.

        Raises:
            UserError: the images have changed; names the first sample that differs.
        """
        if not (self.folder / LISTING).is_file():
            return
        check_listing(self.folder, self._hashes, self._key_of)
        for index, numbers in sorted(recorded_pieces(self.folder).items()):
            if index in inputs and index < len(self.images.names):
                self._check_input(index, numbers)

    def claim(self) -> None:
        """Store the list of inputs of a new folder; another process may have done so.

        Raises:
            UserError: see `check`.
        """
        claim_listing(self.folder, self._hashes, self._key_of)

    def _check_input(self, index: int, numbers: Sequence[int]) -> None:
        records = {number: complete_record(self._path(index, number)) for number in numbers}
        found = {number: record for number, record in records.items() if record is not None}
        try:
            archive = self.images.stamp(index) if isinstance(self.images, TarShards) else None
            if archive is not None and all(record["archive"] == archive for record in found.values()):
                return
            entries = self.images.open(index).entries(0)
        except UnreadableShard as error:
            raise changed_inputs(
                self.folder, f"{self.images.names[index]} cannot be opened ({error})"
            ) from error
        last_key = ""
        for number, piece, last in split_pieces(entries, self.per_shard):
            last_key = piece[-1].key
            if (record := found.pop(number, None)) is not None:
                self._check_piece(self._path(index, number), record, piece, last, archive)
        if found:
            raise changed_inputs(self.folder, f"images after {last_key!r} are missing")

    def _check_piece(
        self,
        path: Path,
        record: dict[str, Any],
        piece: Sequence[Entry],
        last: bool,
        archive: dict[str, Any] | None,
    ) -> None:
        archive_changed = archive is not None and record["archive"]["file"] != archive["file"]
        before = [SampleRecord(*values) for values in record["samples"]]
        now: list[SampleRecord] = []
        usable_now = False
        for sample, entry in zip_longest(before, piece):
            if sample is None or entry is None:
                changed = f"{sample.key!r} is missing" if sample else f"{entry.key!r} is new"
                raise changed_inputs(self.folder, changed)
            current = CurrentSample(entry.key, hash_labels(entry.key, entry.labels), entry.path, entry.read)
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

    def _path(self, index: int, number: int) -> Path:
        return piece_path(self.folder, index, number, self.shard_format)

    @property
    def _hashes(self) -> list[str]:
        if self._listing is None:
            names = self._names()
            if names is not None:
                self._listing = list(map(hash_name, names))
            else:
                self._listing = [hash_labels(entry.key, entry.labels) for entry in self._rows()]
        return self._listing

    def _key_of(self, number: int) -> str:
        names = self._names()
        if names is not None:
            return names[number]
        return next(islice(self._rows(), number, None)).key

    def _rows(self) -> Iterator[Entry]:
        for index in range(len(self.images.names)):
            yield from self.images.open(index).entries(0)

    def _names(self) -> Sequence[str] | None:
        """Return the names of files or archives, which may have moved; None for rows of an index."""
        if isinstance(self.images, FolderShards):
            return self.images.files
        if isinstance(self.images, TarShards):
            return [name.rpartition("/")[2] for name in self.images.names]
        return None
