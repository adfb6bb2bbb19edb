"""How far the input shards behind a folder of latents are encoded.

latents.json             "input_shards" says how many there are
shard-000002-0001.json   piece 1 of input shard 2; "last" says whether it is its last
unreadable-000005.json   input shard 5 could not be opened, and why; gone once it could
"""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cat_fast.data.files import write_json
from cat_fast.data.latents.format import read_json
from cat_fast.errors import UserError

INPUT_SHARDS = "input_shards"
"""The header's name for their number; folders that one process wrote by keys have none."""

_PIECE = re.compile(r"shard-(\d+)-(\d+)\.")
_LOG = logging.getLogger("cat_fast.data")


def piece_name(index: int, number: int) -> str:
    """Of a piece of input shard `index`, without its ending."""
    return f"shard-{index:06d}-{number:04d}"


def mark_unreadable(folder: Path, index: int, why: str) -> None:
    """Input shard `index` is left out of the folder until it is tried again."""
    write_json(_mark(folder, index), {"why": why})


def mark_readable(folder: Path, index: int) -> None:
    """Input shard `index` could be opened."""
    _mark(folder, index).unlink(missing_ok=True)


class EncodedInputs:
    """Takes the records of a folder, and says which input shards are encoded to the end."""

    def __init__(self) -> None:
        self._pieces: defaultdict[int, set[int]] = defaultdict(set)
        self._lengths: dict[int, int] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        if piece := _PIECE.match(record["shard"]):
            index, number = map(int, piece.groups())
            self._pieces[index].add(number)
            if record["last"]:
                self._lengths[index] = number + 1

    def require_all(self, folder: Path, count: int) -> None:
        """Warns of those that could not be opened.

        Raises:
            UserError: one of the `count` input shards is neither encoded to the end nor such a one.
        """
        missing = [index for index in range(count) if not self._is_done(index)]
        unreadable = [index for index in missing if _mark(folder, index).is_file()]
        if len(unreadable) < len(missing):
            raise UserError(
                f"{folder} is unfinished: {count - len(missing)} of {count} input shards are encoded to the "
                "end; wait for `cat-fast encode-shards` on every machine, or, where it was interrupted, "
                "give the same command again: it goes on where it stopped"
            )
        if unreadable:
            why = read_json(_mark(folder, unreadable[0])).get("why")
            _LOG.warning(
                "data: %s lacks %d of %d input shards, which could not be opened (%s); encode again to have "
                "them tried again",
                *(folder, len(unreadable), count, why),
            )

    def _is_done(self, index: int) -> bool:
        return index in self._lengths and self._pieces[index].issuperset(range(self._lengths[index]))


def _mark(folder: Path, index: int) -> Path:
    return folder / f"unreadable-{index:06d}.json"
