"""Conversion of an image index to webdataset archives with sidecars, for streamed training."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from cat_fast.data.files import atomic_write, write_json
from cat_fast.data.folder_settings import claim_folder
from cat_fast.data.images.index import ImageRecord, Report, Scoring, index_lines, parse_record
from cat_fast.data.images.io import IMAGE_SUFFIXES
from cat_fast.data.input_samples import (
    LISTING,
    NOT_READ,
    CurrentSample,
    Listing,
    SampleRecord,
    changed_inputs,
    claim_listing,
    compare,
    file_stamp,
    hash_content,
    hash_labels,
)
from cat_fast.data.streams.formats.base import Labels
from cat_fast.data.streams.formats.image_files import read_file
from cat_fast.data.streams.formats.sidecar import sidecar_url, write_sidecar
from cat_fast.errors import UserError

HEADER = "shards.json"
LABELS = ("key", "score", "expected", "ratio", "has_text", "has_faces", "caption", "category", "scored_by")
_CHUNK = 4096
"""Rows of the index that are compared at a time."""


@dataclass(frozen=True)
class WrittenShard:
    """A complete shard."""

    path: Path
    records: int
    """Number of index records that belong to it."""
    missing: list[str]
    """Images that could not be added, with the reason."""


class IndexLines(Sequence[ImageRecord]):
    """Sequence of the records of an index on disk; only sixteen bytes per image are held in memory."""

    def __init__(self, path: str | Path, report: Report = lambda where, why: None) -> None:
        self.path, self.report = Path(path), report
        places = ((number, start) for number, start, _ in index_lines(self.path))
        self.places = np.fromiter(places, dtype=np.dtype((np.int64, 2)))
        self._file = self.path.open("rb")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> ImageRecord:  # type: ignore[override] # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, start = self.places[index].tolist()
        self._file.seek(start)
        return parse_record(self._file.readline(), self.path, number, self.report)


def write_shards(
    records: Sequence[ImageRecord],
    folder: Path,
    per_shard: int,
    seed: int,
    scoring: Scoring = list,
) -> Iterator[WrittenShard]:
    """Write shards atomically and yield each one; existing shards are kept.

    Records are shuffled with `seed`, so that every shard has the distribution of the full data set: training
    shuffles within a few shards only. Image files are copied unchanged. A shard whose missing images can be
    read now is written again.

    Args:
        scoring: sets missing scores and ratios of the records of a shard.

    Raises:
        UserError: the index is empty, `per_shard` or `seed` is too small, or the folder contains shards made
            with another index, other images or other settings.
    """
    if not len(records):
        raise UserError("the index contains no images")
    if per_shard < 1:
        raise UserError(f"expected at least 1 image per shard, got {per_shard}")
    if seed < 0:
        raise UserError(f"seed: expected at least 0, got {seed}")
    settings = {"per_shard": per_shard, "seed": seed}
    claim_folder(folder / HEADER, settings, "shards")
    _claim_records(folder, records)
    order = np.random.default_rng(seed).permutation(len(records))
    parts = [order[start : start + per_shard].tolist() for start in range(0, len(order), per_shard)]
    paths = [folder / f"shard-{number:06d}.tar" for number in range(len(parts))]
    for path, chosen in zip(paths, parts, strict=True):
        if (samples := _samples(path)) is not None:
            _check_images(path, samples, [records[i] for i in chosen])
    for path, chosen in zip(paths, parts, strict=True):
        samples = _samples(path)
        if samples is None:
            samples = _write(path, [records[i] for i in chosen], scoring)
        missing = [
            f"{records[i].path}: {s.skipped}" for i, s in zip(chosen, samples, strict=True) if s.skipped
        ]
        yield WrittenShard(path, len(chosen), missing)


def member_name(key: str, taken: Collection[str]) -> str:
    """Return a key without the characters that have a meaning in webdataset names: dots and slashes.

    Args:
        taken: names of the samples before it; a number keeps its name different from them.
    """
    plain = name = re.sub(r"[^\w-]", "_", key)
    number = len(taken)
    while name in taken:
        name, number = f"{plain}_{number}", number + 1
    return name


def _claim_records(folder: Path, records: Sequence[ImageRecord]) -> None:
    """Store the keys and labels that a folder is started with, or compare them."""
    if not (folder / LISTING).is_file():
        claim_listing(folder, map(_hash, records))
        return
    listing, rows = Listing(folder), iter(records)
    while chunk := list(islice(rows, _CHUNK)):
        listing.compare(list(map(_hash, chunk)), [record.key for record in chunk])
    listing.finish()


def _samples(path: Path) -> list[SampleRecord] | None:
    """Return the samples of a complete shard, in the order of the shuffled index, or None."""
    # The sidecar is written last: if it exists, the archive is complete.
    if not path.is_file() or not Path(sidecar_url(str(path))).is_file():
        return None
    try:
        return [SampleRecord(*values) for values in json.loads(_record_path(path).read_bytes())["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_images(path: Path, samples: list[SampleRecord], records: list[ImageRecord]) -> None:
    """Compare the images of a complete shard with those that it contains.

    The shard becomes incomplete if an image that it lacks can be read now.

    Raises:
        UserError: an image has changed.
    """
    now: list[SampleRecord] = []
    usable_now = False
    for sample, record in zip(samples, records, strict=True):
        current = CurrentSample(record.key, _hash(record), record.path, partial(read_file, record.path))
        difference, compared = compare(sample, current)
        if difference and not sample.skipped:
            raise changed_inputs(path.parent, f"{record.key!r}: {difference}")
        usable_now |= bool(difference)
        now.append(compared)
    if usable_now:
        Path(sidecar_url(str(path))).unlink()
    elif now != samples:
        write_json(_record_path(path), {"samples": now})


def _write(path: Path, records: list[ImageRecord], scoring: Scoring) -> list[SampleRecord]:
    from webdataset import TarWriter  # imports torch

    rows: list[dict[str, object]] = []
    samples: list[SampleRecord] = []
    names: set[str] = set()
    with (
        atomic_write(path) as part,
        part.open("wb") as file,
        # Without timestamps, the same index gives the same bytes. Pax allows names of any length.
        TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as archive,
    ):
        for record, scored in zip(records, scoring(records), strict=True):
            suffix = Path(record.path).suffix.lower()
            name = member_name(record.key, names)
            image, sample = _read(record, suffix)
            samples.append(sample)
            if image is None:
                continue
            names.add(name)
            fields = asdict(scored)
            row = {field: fields[field] for field in LABELS} | {"key": name}
            own = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
            archive.write({"__key__": name, suffix[1:]: image, "json": own})
            rows.append(row)
    write_json(_record_path(path), {"samples": samples})
    write_sidecar(path, rows)
    return samples


def _read(record: ImageRecord, suffix: str) -> tuple[bytes | None, SampleRecord]:
    """Return the image of a record, None if it cannot be used."""
    size, modified = file_stamp(record.path)  # before reading, so that a later change is noticed
    sample = SampleRecord(record.key, _hash(record), size, modified, NOT_READ, "")
    if suffix not in IMAGE_SUFFIXES:
        return None, sample._replace(skipped=f"expected an image file, got the extension {suffix!r}")
    try:
        image = read_file(record.path)
    except OSError as error:
        return None, sample._replace(content=None, skipped=str(error))
    return image, sample._replace(content=hash_content(image))


def _hash(record: ImageRecord) -> str:
    return hash_labels(record.key, Labels.of(vars(record)))


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")
