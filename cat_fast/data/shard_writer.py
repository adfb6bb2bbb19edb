"""Conversion of an image index to webdataset archives with sidecars, for streamed training."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from cat_fast.data.files import atomic_write
from cat_fast.data.folder_settings import claim_folder
from cat_fast.data.images.index import ImageRecord, Report, Scoring, index_lines, parse_record
from cat_fast.data.images.io import IMAGE_SUFFIXES
from cat_fast.data.streams.formats.sidecar import sidecar_url, write_sidecar
from cat_fast.errors import UserError

HEADER = "shards.json"
LABELS = ("key", "score", "ratio", "has_text", "has_faces", "caption", "category", "scored_by")


@dataclass(frozen=True)
class WrittenShard:
    """A complete shard."""

    path: Path
    records: int
    """Number of index records that belong to it."""
    missing: list[str]
    """Images that could not be added, with the reason; empty for a shard that existed before."""


class IndexLines(Sequence[ImageRecord]):
    """Sequence of the records of an index on disk; only sixteen bytes per image are held in memory."""

    def __init__(self, path: str | Path, report: Report = lambda where, why: None) -> None:
        self.path, self.report = Path(path), report
        places = ((number, start) for number, start, _ in index_lines(self.path))
        self.places = np.fromiter(places, dtype=np.dtype((np.int64, 2)))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> ImageRecord:  # type: ignore[override] # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, start = self.places[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.readline()
        return parse_record(line, self.path, number, self.report)


def write_shards(
    records: Sequence[ImageRecord],
    folder: Path,
    per_shard: int,
    seed: int,
    scoring: Scoring = list,
) -> Iterator[WrittenShard]:
    """Write shards atomically and yield each one; existing shards are kept.

    Records are shuffled with `seed`, so that every shard has the distribution of the full data set: training
    shuffles within a few shards only. Image files are copied unchanged.

    Args:
        scoring: sets missing scores and ratios of the records of a shard.

    Raises:
        UserError: the index is empty, or the folder contains shards made with another index or other
            settings.
    """
    if not len(records):
        raise UserError("the index contains no images")
    if per_shard < 1:
        raise UserError(f"expected at least 1 image per shard, got {per_shard}")
    ends = [records[0], records[len(records) - 1]]
    digest = hashlib.sha256(json.dumps([asdict(record) for record in ends]).encode()).hexdigest()[:16]
    settings = {"images": len(records), "per_shard": per_shard, "seed": seed, "ends": digest}
    claim_folder(folder / HEADER, settings, "shards")
    order = np.random.default_rng(seed).permutation(len(records))
    for number, start in enumerate(range(0, len(order), per_shard)):
        chosen = order[start : start + per_shard].tolist()
        path = folder / f"shard-{number:06d}.tar"
        # The sidecar is written last: if it exists, the archive is complete.
        complete = Path(sidecar_url(str(path))).exists()
        missing = [] if complete else _write(path, scoring([records[i] for i in chosen]))
        yield WrittenShard(path, len(chosen), missing)


def member_name(key: str) -> str:
    """Return a key without the characters that have a meaning in webdataset names: dots and slashes."""
    return re.sub(r"[^\w-]", "_", key)


def _write(path: Path, records: list[ImageRecord]) -> list[str]:
    rows: list[dict[str, object]] = []
    missing: list[str] = []
    names: set[str] = set()
    with (
        atomic_write(path) as part,
        part.open("wb") as file,
        # Without timestamps, the same index gives the same bytes. Pax allows names of any length.
        TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as archive,
    ):
        for record in records:
            suffix = Path(record.path).suffix.lower()
            name = member_name(record.key)
            name = f"{name}_{len(rows)}" if name in names else name
            try:
                image = _image(record, suffix)
            except (OSError, UserError) as error:
                missing.append(f"{record.path}: {error}")
                continue
            names.add(name)
            fields = asdict(record)
            row = {field: fields[field] for field in LABELS} | {"key": name}
            own = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
            archive.write({"__key__": name, suffix[1:]: image, "json": own})
            rows.append(row)
    write_sidecar(path, rows)
    return missing


def _image(record: ImageRecord, suffix: str) -> bytes:
    if suffix not in IMAGE_SUFFIXES:
        raise UserError(f"expected an image file, got the extension {suffix!r}")
    return Path(record.path).read_bytes()
