"""Columnar metadata of the latents of a data set: a few dozen bytes per latent plus its key and caption."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow

from cat_fast.data.latents.format import LatentEntry


class Location(NamedTuple):
    """Location of a latent: row `row` of the `rows` latents in the file `shard`."""

    shard: str
    row: int
    rows: int


class LatentTable(Sequence[LatentEntry]):
    """Sequence of the entries of all latents, in shard order; each `LatentEntry` is created on access.

    `shapes` is (N, 3) int32, `labels` and `ratios` are (N,) int32. Shard `shards[i]` has the rows from
    `starts[i]` to `starts[i + 1]`.
    """

    def __init__(
        self,
        shards: list[str],
        starts: np.ndarray,
        keys: pyarrow.Array,
        captions: pyarrow.Array,
        numbers: np.ndarray,
    ) -> None:
        self.shards, self.starts = shards, starts
        self._keys, self._captions = keys, captions
        self.labels, self.ratios, self.shapes = numbers[:, 0], numbers[:, 1], numbers[:, 2:]

    class Builder:
        """Builder of a table, shard by shard."""

        def __init__(self) -> None:
            self._shards: list[str] = []
            self._columns: list[tuple[pyarrow.Array, pyarrow.Array, np.ndarray]] = []

        def add(self, shard: str, latents: Sequence[Mapping[str, Any]]) -> None:
            """Append the latents of a commit record."""
            numbers = [[entry["label"], entry["ratio"], *entry["shape"]] for entry in latents]
            self._shards.append(shard)
            self._columns.append(
                (
                    pyarrow.array([entry["key"] for entry in latents], pyarrow.large_string()),
                    pyarrow.array([entry.get("caption") for entry in latents], pyarrow.large_string()),
                    np.array(numbers, dtype=np.int32).reshape(len(latents), 5),
                )
            )

        def finish(self) -> "LatentTable":
            """Return the table."""
            keys, captions, numbers = zip(*self._columns, strict=True)
            return LatentTable(
                self._shards,
                np.cumsum([0, *map(len, numbers)]),
                pyarrow.concat_arrays(keys),
                pyarrow.concat_arrays(captions),
                np.concatenate(numbers),
            )

    def __len__(self) -> int:
        return len(self.ratios)

    @overload
    def __getitem__(self, index: int) -> LatentEntry: ...

    @overload
    def __getitem__(self, index: slice) -> list[LatentEntry]: ...

    def __getitem__(self, index: int | slice) -> LatentEntry | list[LatentEntry]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        channels, height, width = self.shapes[index].tolist()
        return LatentEntry(
            key=self._keys[index].as_py(),
            label=int(self.labels[index]),
            ratio=int(self.ratios[index]),
            shape=(channels, height, width),
            caption=self._captions[index].as_py(),
        )

    @property
    def has_captions(self) -> bool:
        """True if any latent has a caption."""
        return self._captions.null_count < len(self)

    def distinct_captions(self, most: int) -> tuple[int, list[str]]:
        """Return the number of distinct captions, and at most `most` evenly spaced ones."""
        distinct = self._captions.unique().drop_null()
        step = max(1, -(-len(distinct) // most))
        return len(distinct), distinct.take(pyarrow.array(range(0, len(distinct), step))).to_pylist()

    def update_digest(self, digest: "hashlib._Hash") -> None:
        """Update `digest` with all rows in order, without captions."""
        for column in (self.labels, self.ratios, self.shapes):
            digest.update(column.tobytes())
        digest.update("\0".join(self._keys.to_pylist()).encode())

    def locate(self, index: int) -> Location:
        """Return the location of row `index`."""
        index = range(len(self))[index]
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        start, stop = self.starts[shard : shard + 2].tolist()
        return Location(self.shards[shard], index - start, stop - start)
