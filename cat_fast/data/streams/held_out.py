"""Images of a set that are kept out of training, chosen by a hash of their keys."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cat_fast.data.streams.formats.base import Entry, Labels, Shard, ShardSet


@dataclass(frozen=True)
class HeldOut:
    """The choice of images to hold out: a function of the seed and an image's key alone.

    So it is the same for any number of ranks, for any cut of the set into shards, and after resuming.
    """

    share: float
    """Expected share of all images, in [0, 1)."""
    seed: int

    def __contains__(self, key: object) -> bool:
        digest = hashlib.sha256(f"{self.seed} {key}".encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8]) < self.share * 2**64


class TrainingShards:
    """Implements `ShardSet` for all images of a set that are not held out."""

    def __init__(self, shards: ShardSet, held_out: HeldOut) -> None:
        self.shards, self.held_out = shards, held_out
        self.names, self.fingerprint = shards.names, shards.fingerprint

    def open(self, index: int) -> Shard:
        return FilteredShard(self.shards.open(index), lambda key: key not in self.held_out)

    def labels(self, index: int) -> list[Labels] | None:
        """Of all images, the few that are held out included: mixes of ratios are counted by them."""
        return self.shards.labels(index)


class FilteredShard:
    """Implements `Shard` for the samples whose keys pass a filter; they keep their numbers."""

    def __init__(self, shard: Shard, keeps: Callable[[str], bool]) -> None:
        self.shard, self.keeps, self.name = shard, keeps, shard.name

    def entries(self, first: int) -> Iterator[Entry]:
        return (entry for entry in self.shard.entries(first) if self.keeps(entry.key))
