"""Encoding progress of the input shards of a latent folder.

latents.json             "input_shards": their number
shard-000002-0001.json   piece 1 of input shard 2; "last": true for its last piece
unreadable-000005.json   the reason why input shard 5 could not be opened; deleted when it can be
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
"""Header field with the number of input shards; missing in folders of `LatentShardWriter`."""

_PIECE = re.compile(r"shard-(\d+)-(\d+)\.")
_LOG = logging.getLogger("cat_fast.data")


def piece_name(index: int, number: int) -> str:
    """Return the file name of a piece of input shard `index`, without extension."""
    return f"shard-{index:06d}-{number:04d}"


def mark_unreadable(folder: Path, index: int, why: str) -> None:
    """Record that input shard `index` could not be opened; it is missing until encoded again."""
    write_json(_mark(folder, index), {"why": why})


def mark_readable(folder: Path, index: int) -> None:
    """Remove the record that input shard `index` could not be opened."""
    _mark(folder, index).unlink(missing_ok=True)


class EncodedInputs:
    """Completeness check of input shards, based on the commit records of a folder."""

    def __init__(self) -> None:
        self._pieces: defaultdict[int, set[int]] = defaultdict(set)
        self._lengths: dict[int, int] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the commit record of a shard."""
        if piece := _PIECE.match(record["shard"]):
            index, number = map(int, piece.groups())
            self._pieces[index].add(number)
            if record["last"]:
                self._lengths[index] = number + 1

    def require_complete(self, folder: Path, count: int) -> None:
        """Check that all `count` input shards are complete; warn about those that could not be opened.

        Raises:
            UserError: an input shard that could be opened is incomplete.
        """
        missing = [index for index in range(count) if not self._is_done(index)]
        unreadable = [index for index in missing if _mark(folder, index).is_file()]
        if len(unreadable) < len(missing):
            raise UserError(
                f"{folder} is incomplete: {count - len(missing)} of {count} input shards are encoded; wait "
                "for `cat-fast encode-shards` to finish on all machines, or run the same command again to "
                "resume where it was interrupted"
            )
        if unreadable:
            why = read_json(_mark(folder, unreadable[0])).get("why")
            _LOG.warning(
                "data: %s lacks %d of %d input shards, which could not be opened (%s); encode again to retry "
                "them",
                *(folder, len(unreadable), count, why),
            )

    def _is_done(self, index: int) -> bool:
        return index in self._lengths and self._pieces[index].issuperset(range(self._lengths[index]))


def _mark(folder: Path, index: int) -> Path:
    return folder / f"unreadable-{index:06d}.json"
