"""How a run samples ratios: its configuration, and the plan that it asks for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cat_fast.data.sampling.balanced_plan import BalancedPlan
from cat_fast.data.sampling.cost_table import CostTable
from cat_fast.data.sampling.step_plan import PerRankPlan, StepPlan
from cat_fast.errors import UserError

MODES = ("per_rank", "balanced")


@dataclass(kw_only=True)
class RatioSamplerConfig:
    """How ratios are drawn and which images a ratio may be given."""

    mode: str = "per_rank"
    """`per_rank`: each rank draws a ratio by the mix, and data.batch_size images, as the paper trains.
    `balanced`: a step is planned for all ranks so that each has the same predicted cost; a rank then takes
    fewer images at dear ratios and more at cheap ones, data.batch_size on average."""
    cost_table: str = ""
    """File of `cat-fast plan cost`, for `balanced`; without one, ratios cost what their operations count."""
    max_wait: float = 0.025
    """For `balanced`: ratios share a step if its ranks are expected to wait no more than this share of it."""
    pool: str = "own_ratio"
    """`own_ratio`: each image at the ratio its description chose, as the paper trains. `all`: every image
    at every ratio, for sets so small that a ratio would otherwise see two images."""
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
) -> StepPlan:
    """Return the plan that a configuration asks for; `costs` are needed by `balanced`.

    Raises:
        UserError: the costs lack a ratio.
    """
    if config.mode == "per_rank":
        return PerRankPlan(shares, batch_size, world_size, seed)
    assert costs is not None
    return BalancedPlan(shares, batch_size, world_size, seed, costs, config.max_wait)
