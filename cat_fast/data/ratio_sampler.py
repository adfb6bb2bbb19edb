"""Which pictures, at which ratio, each rank trains on in each step.

A rank draws one ratio a step; different ranks may draw different ones (spec: "Nested VAE"). The draw is
planned for all ranks at once from (seed, step), so every rank knows the whole plan, no two ranks are given
the same picture, and the position in the data is a handful of counters.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cat_fast.errors import UserError


@dataclass(kw_only=True)
class RatioSamplerConfig:
    """How ratios are drawn and which pictures a ratio may be given."""

    pool: str = "own_ratio"
    """`own_ratio`: each picture at the ratio its description chose, as the paper trains. `all`: every picture
    at every ratio, for sets so small that a ratio would otherwise see two pictures."""
    shares: dict[int, float] = field(default_factory=dict)
    """Chance of each ratio; empty takes the data's own mix."""

    def __post_init__(self) -> None:
        if self.pool not in ("own_ratio", "all"):
            raise UserError(f"sampler.pool: {self.pool!r} is not own_ratio or all")
        if any(share < 0 for share in self.shares.values()) or (
            self.shares and sum(self.shares.values()) <= 0
        ):
            raise UserError(f"sampler.shares: {self.shares} are no shares")


class RankBatch(NamedTuple):
    """What one rank trains on in one step."""

    ratio: int
    indices: list[int]


class RatioSampler:
    """Plans steps in order; `state_dict` holds its whole position.

    Args:
        ratios: the ratio chosen for each picture, (N,).
        batch_size: pictures a rank sees in a step.
        world_size: number of ranks.

    Raises:
        UserError: no pictures, or a ratio with a share but without pictures.
    """

    def __init__(
        self, ratios: list[int], batch_size: int, world_size: int, seed: int, config: RatioSamplerConfig
    ) -> None:
        if not ratios:
            raise UserError("ratio sampler: the image index holds no pictures")
        chosen = np.asarray(ratios)
        shares = config.shares or {int(f): float(np.mean(chosen == f)) for f in np.unique(chosen)}
        self.shares = {f: share / sum(shares.values()) for f, share in sorted(shares.items()) if share > 0}
        every = np.arange(len(chosen))
        self.pools = {f: every if config.pool == "all" else every[chosen == f] for f in self.shares}
        for f, pool in self.pools.items():
            if not len(pool):
                raise UserError(
                    f"ratio sampler: ratio {f} has a share but no picture; lower it or use pool=all"
                )
        self.batch_size, self.world_size, self.seed = batch_size, world_size, seed
        self.step = 0
        self.drawn = dict.fromkeys(self.pools, 0)

    def plan(self) -> list[RankBatch]:
        """One batch a rank for the next step."""
        rng = np.random.default_rng([self.seed, self.step])
        ratios = rng.choice(list(self.shares), size=self.world_size, p=list(self.shares.values()))
        self.step += 1
        return [RankBatch(int(f), self._take(int(f))) for f in ratios]

    def _take(self, ratio: int) -> list[int]:
        """The next pictures of a pool: each comes up once before any comes up again."""
        pool = self.pools[ratio]
        first = self.drawn[ratio]
        self.drawn[ratio] += self.batch_size
        return [self._at(ratio, pool, place) for place in range(first, first + self.batch_size)]

    def _at(self, ratio: int, pool: np.ndarray, place: int) -> int:
        epoch, position = divmod(place, len(pool))
        order = np.random.default_rng([self.seed, ratio, epoch]).permutation(len(pool))
        return int(pool[order[position]])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "drawn": {str(f): n for f, n in self.drawn.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.drawn = {f: int(state["drawn"].get(str(f), 0)) for f in self.pools}
