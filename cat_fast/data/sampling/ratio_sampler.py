"""Configuration of the ratio sampler (`sampler`), and the step plan built from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cat_fast.data.sampling.balanced_plan import BalancedPlan
from cat_fast.data.sampling.cost_table import CostTable
from cat_fast.data.sampling.step_plan import PerRankPlan, StepPlan
from cat_fast.errors import UserError

MODES = ("per_rank", "balanced")


@dataclass(kw_only=True)
class RatioSamplerConfig:
    """How ratios are drawn, and which images may be used at a ratio."""

    mode: str = "per_rank"
    """`per_rank`: each rank draws a ratio from the mix and takes data.batch_size images, as in the paper.
    `balanced`: steps are planned so that all ranks have about the same predicted cost; a rank takes fewer
    images at expensive ratios and more at cheap ones, data.batch_size on average."""
    cost_table: str = ""
    """Output file of `cat-fast plan cost`, for `balanced`; empty uses the FLOPs of each ratio as its cost."""
    max_wait: float = 0.025
    """For `balanced`: maximum expected share of waiting time in a step that combines ratios."""
    pool: str = "own_ratio"
    """`own_ratio`: each image at the ratio chosen from its description, as in the paper. `all`: every image
    at every ratio, for data sets so small that a ratio would otherwise get only a few images."""
    shares: dict[int, float] = field(default_factory=dict)
    """Share of each ratio; empty uses the mix of the data."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"sampler.mode: {self.mode!r} is not {' or '.join(MODES)}")
        if self.cost_table and self.mode != "balanced":
            raise UserError("sampler.cost_table: only sampler.mode=balanced uses one")
        if not 0 < self.max_wait < 1:
            raise UserError(f"sampler.max_wait: {self.max_wait} is not within (0, 1)")
        if self.pool not in ("own_ratio", "all"):
            raise UserError(f"sampler.pool: {self.pool!r} is not own_ratio or all")
        shares = self.shares.values()
        if shares and not (all(share >= 0 for share in shares) and 0 < sum(shares) < math.inf):
            raise UserError(
                f"sampler.shares: {self.shares} must be non-negative and finite with a positive sum"
            )


def make_plan(
    config: RatioSamplerConfig,
    shares: Mapping[int, float],
    batch_size: int,
    world_size: int,
    seed: int,
    costs: CostTable | None,
) -> StepPlan:
    """Return the step plan of a configuration; mode `balanced` requires `costs`.

    Raises:
        UserError: `costs` lacks a ratio.
    """
    if config.mode == "per_rank":
        return PerRankPlan(shares, batch_size, world_size, seed)
    assert costs is not None
    return BalancedPlan(shares, batch_size, world_size, seed, costs, config.max_wait)
