"""Held-out images, chosen by a hash of their keys."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cat_fast.data.streams.formats.base import Entry, Labels, Shard, ShardSet


@dataclass(frozen=True)
class HeldOut:
    """Set of held-out keys, which depends on the seed and the key only.

    It is the same for any number of ranks, for any division into shards, and after resuming.
    """

    share: float
    """Expected share of all images, in [0, 1)."""
    seed: int

    def __contains__(self, key: object) -> bool:
        digest = hashlib.sha256(f"{self.seed} {key}".encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8]) < self.share * 2**64


class TrainingShards:
    """`ShardSet` without the held-out images."""

    def __init__(self, shards: ShardSet, held_out: HeldOut) -> None:
        self.shards, self.held_out = shards, held_out
        self.names, self.fingerprint, self.extent = shards.names, shards.fingerprint, shards.extent

    def open(self, index: int) -> Shard:
        return FilteredShard(self.shards.open(index), lambda key: key not in self.held_out)

    def labels(self, index: int) -> list[Labels] | None:
        """Return the labels of all images, including held-out ones: they are only used to count ratios."""
        return self.shards.labels(index)


class FilteredShard:
    """`Shard` restricted to the samples whose keys pass a filter; they keep their numbers."""

    def __init__(self, shard: Shard, keeps: Callable[[str], bool]) -> None:
        self.shard, self.keeps, self.name = shard, keeps, shard.name

    def entries(self, first: int) -> Iterator[Entry]:
        return (entry for entry in self.shard.entries(first) if self.keeps(entry.key))
