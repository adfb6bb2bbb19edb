"""Pieces of input shards: piece k of input shard i becomes latent shard shard-iiiiii-kkkk."""

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from cat_fast.data.latents.format import SUFFIXES, damage, read_json
from cat_fast.data.latents.inputs import piece_name
from cat_fast.data.streams.formats.base import Entry

_RECORD = re.compile(r"shard-(\d+)-(\d+)\.json")


def piece_path(folder: Path, index: int, number: int, shard_format: str) -> Path:
    """Return the file of piece `number` of input shard `index`."""
    return folder / f"{piece_name(index, number)}{SUFFIXES[shard_format]}"


def split_pieces(entries: Iterator[Entry], size: int) -> Iterator[tuple[int, list[Entry], bool]]:
    """Yield (number, entries, is_last), `size` entries at a time."""
    head = next(entries, None)
    for number in count():
        if head is None:
            return
        piece = [head, *islice(entries, size - 1)]
        head = next(entries, None)
        yield number, piece, head is None


def complete_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a complete shard, or None. Only sizes are checked: hashing would take hours."""
    record_path = path.with_suffix(".json")
    if not record_path.is_file():
        return None
    record = read_json(record_path)
    return record if damage(path.parent, record) is None else None


def finished_records(folder: Path, index: int, shard_format: str) -> list[dict[str, Any]] | None:
    """Return the records of all pieces of an input shard, or None if any piece is missing."""
    records = []
    for number in count():
        record = complete_record(piece_path(folder, index, number, shard_format))
        if record is None:
            return None
        records.append(record)
        if record["last"]:
            break
    return records


def recorded_pieces(folder: Path) -> dict[int, list[int]]:
    """Return the numbers of the recorded pieces of each input shard."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for path in sorted(folder.glob("shard-*.json")):
        if match := _RECORD.fullmatch(path.name):
            found[int(match[1])].append(int(match[2]))
    return found
