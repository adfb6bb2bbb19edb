"""Assignment of shards to ranks per epoch, also after a change of the number of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class RankShards(NamedTuple):
    """A rank's shards for one epoch, in order; the rank reads every `stride`-th sample of each."""

    shards: list[int]
    stride: int = 1
    offset: int = 0

    def includes(self, shard: int, number: int) -> bool:
        """Return whether a sample belongs to this rank.

        The sample numbers change with the shard and, through `offset`, with the epoch. Otherwise a rank would
        always get the same ratio from data in which ratios alternate.
        """
        return (number + shard) % self.stride == self.offset


@dataclass(frozen=True)
class PartialEpoch:
    """An epoch started on another number of ranks, and the shards finished there."""

    epoch: int
    done: frozenset[int]


@dataclass(frozen=True)
class ShardAssignment:
    """Assignment of shards to ranks; ratios differ only in their entry of `partial_epochs`."""

    shard_count: int
    world_size: int
    seed: int
    partial_epochs: Mapping[int, PartialEpoch] = field(default_factory=dict)
    """By ratio: the epoch that was current when the number of ranks changed."""

    def rank_shards(self, ratio: int, epoch: int, rank: int) -> RankShards:
        """Return a rank's shards of an epoch: every world-size-th, or all if there are fewer than ranks."""
        order = np.random.default_rng([self.seed, epoch, 0, 3]).permutation(self.shard_count).tolist()
        partial = self.partial_epochs.get(ratio)
        if partial is not None and partial.epoch == epoch:
            order = [shard for shard in order if shard not in partial.done]
        if len(order) < self.world_size:
            return RankShards(order, self.world_size, (rank + epoch) % self.world_size)
        return RankShards(order[rank :: self.world_size])

    def reassign(
        self, world_size: int, reached: Mapping[int, Sequence[tuple[int, int]]]
    ) -> "ShardAssignment":
        """Return the assignment for another number of ranks, given the progress of the old ranks.

        Each ratio resumes in the earliest epoch that any of its ranks had reached. Shards finished by every
        rank that reads them are done; the others are assigned again and read from their start. No image is
        skipped. Images already read from unfinished shards are repeated once. So are images of the next epoch
        that ranks ahead of the others had read.

        Args:
            reached: by ratio, each old rank's epoch and its number of finished shards in that epoch.
        """
        partial_epochs = {}
        for ratio, positions in reached.items():
            epoch = min(position[0] for position in positions)
            finished = []
            before = self.partial_epochs.get(ratio)
            done = set(before.done) if before is not None and before.epoch == epoch else set()
            per_rank = [self.rank_shards(ratio, epoch, rank) for rank in range(self.world_size)]
            for (shards, *_), (rank_epoch, count) in zip(per_rank, positions, strict=True):
                finished.append(set(shards if rank_epoch > epoch else shards[:count]))
            strided = per_rank[0].stride > 1
            done |= set.intersection(*finished) if strided else set.union(*finished)
            partial_epochs[ratio] = PartialEpoch(epoch, frozenset(done))
        return ShardAssignment(self.shard_count, world_size, self.seed, partial_epochs)

    def first_epoch(self, ratio: int) -> int:
        """Return the epoch in which the ranks of this assignment start."""
        partial = self.partial_epochs.get(ratio)
        return partial.epoch if partial is not None else 0

    def state_dict(self) -> dict[str, Any]:
        """Return the partial epochs as JSON values; finished shards are the 1 bits of a hexadecimal mask."""
        return {
            str(ratio): {"epoch": partial.epoch, "done": f"{sum(1 << shard for shard in partial.done):x}"}
            for ratio, partial in self.partial_epochs.items()
        }

    def with_state(self, state: Mapping[str, Any]) -> "ShardAssignment":
        """Return this assignment with the partial epochs of a `state_dict`."""
        partial_epochs = {}
        for ratio, fields in state.items():
            bits = int(fields["done"], 16)
            done = frozenset(shard for shard in range(self.shard_count) if bits >> shard & 1)
            partial_epochs[int(ratio)] = PartialEpoch(int(fields["epoch"]), done)
        return ShardAssignment(self.shard_count, self.world_size, self.seed, partial_epochs)
