"""Image-text pairs as sequences: encoded once by all ranks together, and read from a file by each."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cat_fast.data.files import atomic_write
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.images.io import load_image
from cat_fast.data.row_file import RowFile
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.source import MAX_CONSECUTIVE_FAILURES
from cat_fast.dual_token.grid import Grid
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.training.checkpoints.initial_settings import require_same_settings
from cat_fast.training.config.dual_token import LanguageDataConfig
from cat_fast.training.dual_token.pairs import pairs_identity, read_pairs
from cat_fast.training.runtime.collective_errors import on_each, on_main, raise_together
from cat_fast.training.runtime.divided_work import map_over_ranks
from cat_fast.training.runtime.ranks import Ranks

STREAMS = {"data.index": 11, "data.held_out": 14}
"""Random stream of the guide sizes, by the setting that names the images."""
_PER_RANK = 32
"""Images that a rank encodes before the sequences of all ranks are stored."""


class EncodedPair(NamedTuple):
    """A sequence and its caption."""

    key: str
    caption: str
    ids: list[int]


def encode_pairs(
    path: Path,
    index: str,
    key: str,
    tokenizer: DualTokenizer,
    config: LanguageDataConfig,
    seed: int,
    ranks: Ranks,
) -> None:
    """Collective: encode the images of an index to a file, unless it is there.

    The guide size of an image is drawn from the seed, the key and its place, so the file is the same on any
    number of ranks. Images that cannot be encoded are reported and left out. A killed call resumes.

    Args:
        key: setting that names the index, one of `STREAMS`.

    Raises:
        SharedError: the index or the grids cannot be used, no image can be encoded, or the file is of other
            pairs, another tokenizer or other settings.
    """
    records = on_each(lambda: read_pairs(index, key), ranks)
    grids = on_each(lambda: _grids(tokenizer, config), ranks)
    identity: dict[str, Any] = {
        "tokenizer": tokenizer.fingerprint(),
        "grids": json.loads(json.dumps(config.grids)),
        "seed": seed,
        **pairs_identity(((record.key, record.caption) for record in records), key),
    }
    different = UserError(f"{key}: {index} differs from rank 0's: all ranks must see the same files")
    raise_together(None if ranks.broadcast(identity) == identity else different, ranks)
    if on_main(lambda: _is_encoded(path, identity, key), ranks):
        return
    random = np.random.default_rng([seed, 0, 0, STREAMS[key]])
    images = [(record, grids[int(random.integers(len(grids)))]) for record in records]
    sequences = _Sequences(path, identity, key, records)
    done = on_main(sequences.resume, ranks)
    for part in map_over_ranks(partial(_encode, tokenizer), images[done:], ranks, _PER_RANK):
        on_main(partial(sequences.add, part), ranks)
    on_main(sequences.finish, ranks)


def read_encoded(path: Path) -> list[EncodedPair]:
    """Return the pairs of a file of `encode_pairs`."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [EncodedPair(*json.loads(line)) for line in lines]


class _Encoded(NamedTuple):
    """Ids of an image; none if it cannot be encoded, for which `error` is the reason."""

    ids: list[int]
    error: str = ""


class _Sequences:
    """Sequences of a file that is written by rank 0 once they are complete.

    Until then they are in `.NAME.rows` next to it, from which a killed call resumes.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], key: str, records: Sequence[ImageRecord]
    ) -> None:
        self.path, self.identity, self.key, self.records = path, identity, key, records
        self._pairs: list[EncodedPair] = []
        """Pairs of the first records, without ids where an image cannot be encoded."""
        self._stored = 0
        self._rows = RowFile(path.with_name(f".{path.name}.rows"))
        self._problems = ProblemLog()

    def resume(self) -> int:
        """Return the number of pairs that a killed call has stored; those of other settings are deleted."""
        header, *rows = self._rows.read() or [{}]
        keys = [record.key for record in self.records[: len(rows)]]
        if header == self.identity and [row["key"] for row in rows] == keys:
            self._pairs = [EncodedPair(**row) for row in rows]
        else:
            self._rows.path.unlink(missing_ok=True)
            self._rows.append(self.identity)
        self._stored = len(self._pairs)
        return self._stored

    def add(self, part: Sequence[_Encoded]) -> None:
        """Add the sequences of the next records.

        Raises:
            UserError: too many images in a row cannot be encoded, or the sequences cannot be stored.
        """
        first = len(self._pairs)
        for record, encoded in zip(self.records[first : first + len(part)], part, strict=True):
            self._pairs.append(EncodedPair(record.key, record.caption, encoded.ids))
            if encoded.error:
                self._problems.report(f"{self.key}: {record.key}", encoded.error)
        self._store()
        failures = len(self._pairs) - self._stored
        if failures >= min(MAX_CONSECUTIVE_FAILURES, len(self.records)):
            raise UserError(
                f"{self.key}: {failures} images in a row cannot be encoded; the last: {part[-1].error}. "
                "Check the paths in the index, and data.grids"
            )

    def _store(self) -> None:
        """Store the pairs up to the last one with a sequence."""
        # The images after it are read again by a resumed call: their disk may only have been missing.
        pending = enumerate(self._pairs[self._stored :], self._stored + 1)
        end = max((number for number, pair in pending if pair.ids), default=self._stored)
        for pair in self._pairs[self._stored : end]:
            self._rows.append(pair._asdict())
        self._stored = end

    def finish(self) -> None:
        """Write the file.

        Raises:
            UserError: it cannot be written.
        """
        with atomic_write(self.path) as part, part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.identity) + "\n")
            file.writelines(json.dumps(pair) + "\n" for pair in self._pairs if pair.ids)
        self._rows.path.unlink(missing_ok=True)


def _grids(tokenizer: DualTokenizer, config: LanguageDataConfig) -> list[Grid]:
    grids = config.all_grids
    largest = max(side for grid in grids for side in grid)
    if largest > tokenizer.max_side:
        raise UserError(f"data.grids: expected at most {tokenizer.max_side} tokens per side, got {largest}")
    return grids


def _is_encoded(path: Path, identity: Mapping[str, Any], key: str) -> bool:
    """Return True if the file is complete.

    Raises:
        UserError: it is of other pairs, another tokenizer or other settings.
    """
    if not path.is_file():
        return False
    with path.open(encoding="utf-8") as file:
        found = json.loads(file.readline())
    if "index" in found:  # by an earlier version, which identified the pairs by the path of their index
        found |= pairs_identity(((pair.key, pair.caption) for pair in read_encoded(path)), key)
    try:
        require_same_settings(found, identity)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return True


def _encode(tokenizer: DualTokenizer, images: Sequence[tuple[ImageRecord, Grid]]) -> list[_Encoded]:
    found = []
    for record, grid in images:
        try:
            tokens = tokenizer.encode(load_image(record.path), grid)
        except UserError as error:
            found.append(_Encoded([], str(error)))
        else:
            found.append(_Encoded(tokenizer.vocabulary.flatten(tokens)))
    return found
