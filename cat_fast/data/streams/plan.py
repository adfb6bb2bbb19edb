"""Ratio and number of pictures of every step, for sets whose pictures nobody has counted."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from cat_fast.data.ratio_sampler import RatioSampler, RatioSamplerConfig
from cat_fast.data.streams.shard import Rating, ShardSet, UnreadableShard
from cat_fast.errors import UserError

SHARDS_COUNTED = 16


class Planned(NamedTuple):
    """What one rank trains on in one step, and the planner's state after it."""

    ratio: int
    count: int
    state: dict[str, Any]


class StreamPlan:
    """`RatioSampler` over stand-ins: it draws ratios and counts as ever, and the stream has the pictures.

    Args:
        shares: of the ratios, such as those that `counted` finds.
    """

    def __init__(
        self,
        shares: dict[int, float],
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        config: RatioSamplerConfig,
    ) -> None:
        self.ratios = sorted(ratio for ratio, share in shares.items() if share > 0)
        stand_ins = self.ratios  # a picture of each
        self.sampler = RatioSampler(stand_ins, batch_size, world_size, seed, replace(config, shares=shares))
        self.rank = rank

    def next(self) -> Planned:
        ratio, indices = self.sampler.plan()[self.rank][:2]
        return Planned(ratio, len(indices), self.sampler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


def counted(shards: ShardSet, rating: Rating) -> dict[int, float]:
    """The mix of ratios in the labels of a few shards, spread over the set.

    Raises:
        UserError: the labels name no ratio.
    """
    found: dict[int, int] = {}
    for index in _spread(len(shards.names), SHARDS_COUNTED):
        try:
            labels = shards.labels(index) or []
        except UnreadableShard:
            continue
        for label in labels:
            if (ratio := rating.by_labels(label)) is not None:
                found[ratio] = found.get(ratio, 0) + 1
    if not found:
        raise UserError(
            "sampler.shares: the shares of the ratios are not known, as no scores lie beside the pictures; "
            "say them, such as sampler.shares={8: 0.1, 16: 0.48, 32: 0.42}"
        )
    total = sum(found.values())
    return {ratio: count / total for ratio, count in sorted(found.items())}


def _spread(total: int, count: int) -> Iterable[int]:
    return range(total) if total <= count else (i * total // count for i in range(count))
