"""Which shards each rank reads in which order, epoch by epoch, and after a change of the number of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Hand(NamedTuple):
    """A rank's part of an epoch: `shards` in order, of whose samples it takes every `stride`-th."""

    shards: list[int]
    stride: int = 1
    offset: int = 0

    def takes(self, shard: int, number: int) -> bool:
        """Whether a sample is this rank's. The place changes with the shard and, in `offset`, with the epoch:
        where ratios alternate, a rank would else get the same one for ever."""
        return (number + shard) % self.stride == self.offset


@dataclass(frozen=True)
class Left:
    """An epoch that began on another number of ranks, and the shards of it that were `done` there."""

    epoch: int
    done: frozenset[int]


@dataclass(frozen=True)
class Dealing:
    """Shards to ranks. Ratios differ in `left` only, by the epochs in which they were."""

    shard_count: int
    world_size: int
    seed: int
    left: Mapping[int, Left] = field(default_factory=dict)

    def hand(self, ratio: int, epoch: int, rank: int) -> Hand:
        """Shards in the order of the epoch, dealt in turn; all to each where there are fewer than ranks."""
        order = np.random.default_rng([self.seed, epoch, 0, 3]).permutation(self.shard_count).tolist()
        left = self.left.get(ratio)
        if left is not None and left.epoch == epoch:
            order = [shard for shard in order if shard not in left.done]
        if len(order) < self.world_size:
            return Hand(order, self.world_size, (rank + epoch) % self.world_size)
        return Hand(order[rank :: self.world_size])

    def resumed(self, world_size: int, reached: Mapping[int, Sequence[tuple[int, int]]]) -> "Dealing":
        """The dealing for another number of ranks, from where each of the old ones was.

        Each ratio goes on in the earliest epoch that one of its ranks was in. Shards which all who take from
        them had finished are done; the others are dealt anew and read from their start. So no image is left
        out; those that were seen of shards under way come up once more, and so do those that ranks ahead of
        the others had seen of the next epoch.

        Args:
            reached: by ratio, each old rank's epoch and how many shards of its hand it had finished.
        """
        left = {}
        for ratio, positions in reached.items():
            epoch = min(position[0] for position in positions)
            finished = []
            before = self.left.get(ratio)
            done = set(before.done) if before is not None and before.epoch == epoch else set()
            hands = [self.hand(ratio, epoch, rank) for rank in range(self.world_size)]
            for hand, (its_epoch, count) in zip(hands, positions, strict=True):
                finished.append(set(hand.shards if its_epoch > epoch else hand.shards[:count]))
            strided = hands[0].stride > 1
            done |= set.intersection(*finished) if strided else set.union(*finished)
            left[ratio] = Left(epoch, frozenset(done))
        return Dealing(self.shard_count, world_size, self.seed, left)

    def first_epoch(self, ratio: int) -> int:
        """The epoch that ranks of this dealing begin in."""
        left = self.left.get(ratio)
        return left.epoch if left is not None else 0

    def state_dict(self) -> dict[str, Any]:
        """JSON; the done shards as a number with a bit each, in hexadecimal."""
        return {
            str(ratio): {"epoch": left.epoch, "done": f"{sum(1 << shard for shard in left.done):x}"}
            for ratio, left in self.left.items()
        }

    def with_state(self, state: Mapping[str, Any]) -> "Dealing":
        left = {}
        for ratio, fields in state.items():
            bits = int(fields["done"], 16)
            done = frozenset(shard for shard in range(self.shard_count) if bits >> shard & 1)
            left[int(ratio)] = Left(int(fields["epoch"]), done)
        return Dealing(self.shard_count, self.world_size, self.seed, left)
