"""Which pictures, at which ratio, each rank trains on in each step.

A rank trains at one ratio a step; different ranks may train at different ones (spec: "Nested VAE"). A plan
(`step_plan`, `balanced_plan`) says how many pictures of which ratio each rank takes; here they are given
pictures, for all ranks at once, so that every rank knows the whole step and no two ranks get the same
picture. The position in the data is a handful of counters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cat_fast.data.sampling.balanced_plan import BalancedPlan
from cat_fast.data.sampling.cost_table import CostTable
from cat_fast.data.sampling.step_plan import PerRankPlan, StepPlan
from cat_fast.errors import UserError

MODES = ("per_rank", "balanced")


@dataclass(kw_only=True)
class RatioSamplerConfig:
    """How ratios are drawn and which pictures a ratio may be given."""

    mode: str = "per_rank"
    """`per_rank`: each rank draws a ratio by the mix, and data.batch_size pictures, as the paper trains.
    `balanced`: a step is planned for all ranks so that each has the same predicted cost; a rank then takes
    fewer pictures at dear ratios and more at cheap ones, data.batch_size on average."""
    cost_table: str = ""
    """File of `cat-fast plan cost`, for `balanced`; without one, ratios cost what their operations count."""
    max_wait: float = 0.025
    """For `balanced`: ratios share a step if its ranks are expected to wait no more than this share of it."""
    pool: str = "own_ratio"
    """`own_ratio`: each picture at the ratio its description chose, as the paper trains. `all`: every picture
    at every ratio, for sets so small that a ratio would otherwise see two pictures."""
    shares: dict[int, float] = field(default_factory=dict)
    """Chance of each ratio; empty takes the data's own mix."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"sampler.mode: {self.mode!r} is not {' or '.join(MODES)}")
        if self.cost_table and self.mode != "balanced":
            raise UserError("sampler.cost_table: only sampler.mode=balanced uses one")
        if not 0 < self.max_wait < 1:
            raise UserError(f"sampler.max_wait: {self.max_wait} is not within (0, 1)")
        if self.pool not in ("own_ratio", "all"):
            raise UserError(f"sampler.pool: {self.pool!r} is not own_ratio or all")
        if any(share < 0 for share in self.shares.values()) or (
            self.shares and sum(self.shares.values()) <= 0
        ):
            raise UserError(f"sampler.shares: {self.shares} are no shares")


def make_plan(
    config: RatioSamplerConfig,
    shares: Mapping[int, float],
    batch_size: int,
    world_size: int,
    seed: int,
    costs: CostTable | None,
    epoch: Mapping[int, int] | None = None,
) -> StepPlan:
    """The plan that a configuration asks for. `costs` are needed by `balanced`; `epoch` as `BalancedPlan`.

    Streams, which cannot index pictures, use it alone: they count what they have drawn of each ratio.

    Raises:
        UserError: the costs lack a ratio.
    """
    if config.mode == "per_rank":
        return PerRankPlan(shares, batch_size, world_size, seed)
    assert costs is not None
    return BalancedPlan(shares, batch_size, world_size, seed, costs, config.max_wait, epoch)


class RankBatch(NamedTuple):
    """What one rank trains on in one step."""

    ratio: int
    indices: list[int]
    counts: bool = True
    """Not that of an idle rank, which runs on a picture of another to keep the rest company."""


class RatioSampler:
    """Plans steps in order; `state_dict` holds its whole position.

    Each picture of a ratio comes up once before any comes up again. A balanced plan of the data's own mix
    also ends the epochs of all ratios together: an epoch is then each picture exactly once.

    Args:
        ratios: the ratio chosen for each picture, (N,).
        batch_size: pictures a rank sees in a step.
        world_size: number of ranks.
        costs: for `sampler.mode: balanced`.

    Raises:
        UserError: no pictures, a ratio with a share but without pictures, or one without costs.
    """

    def __init__(
        self,
        ratios: Sequence[int],
        batch_size: int,
        world_size: int,
        seed: int,
        config: RatioSamplerConfig,
        costs: CostTable | None = None,
    ) -> None:
        if not len(ratios):
            raise UserError("ratio sampler: the image index holds no pictures")
        self.chosen = chosen = np.asarray(ratios)
        mix = {int(f): int(np.sum(chosen == f)) for f in np.unique(chosen)}
        own_mix = not config.shares and config.pool == "own_ratio"
        shares = config.shares or mix
        self.plan_of = make_plan(
            config, shares, batch_size, world_size, seed, costs, epoch=mix if own_mix else None
        )
        self.shares = self.plan_of.shares
        every = np.arange(len(chosen))
        self.pools = {
            f: _Pool(every if config.pool == "all" else every[chosen == f], seed, f) for f in self.shares
        }
        for f, pool in self.pools.items():
            if not len(pool.pictures):
                raise UserError(
                    f"ratio sampler: ratio {f} has a share but no picture; lower it or use pool=all"
                )
        self.step = 0
        self.drawn = dict.fromkeys(self.pools, 0)

    def plan(self) -> list[RankBatch]:
        """One batch a rank for the next step."""
        parts = self.plan_of.plan(self.step, self.drawn)
        self.step += 1
        batches = [RankBatch(f, self._take(f, count), counts=count > 0) for f, count in parts]
        some = {batch.ratio: batch.indices[:1] for batch in batches if batch.counts}
        return [batch if batch.counts else batch._replace(indices=some[batch.ratio]) for batch in batches]

    def _take(self, ratio: int, count: int) -> list[int]:
        first = self.drawn[ratio]
        self.drawn[ratio] += count
        return self.pools[ratio].slice(first, count)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "drawn": {str(f): n for f, n in self.drawn.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.drawn = {f: int(state["drawn"].get(str(f), 0)) for f in self.pools}


class _Pool:
    """The pictures of one ratio in a new order each epoch."""

    def __init__(self, pictures: np.ndarray, seed: int, ratio: int) -> None:
        self.pictures, self.seed, self.ratio = pictures, seed, ratio
        self.epoch, self.order = -1, pictures

    def slice(self, first: int, count: int) -> list[int]:
        """The `first`-th to the `first + count - 1`-th picture drawn since the start of the run."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, position = divmod(first + len(indices), len(self.pictures))
            if epoch != self.epoch:
                shuffled = np.random.default_rng([self.seed, self.ratio, epoch])
                self.epoch, self.order = epoch, self.pictures[shuffled.permutation(len(self.pictures))]
            indices += self.order[position : position + count - len(indices)].tolist()
        return indices
