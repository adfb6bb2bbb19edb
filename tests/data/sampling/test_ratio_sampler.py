"""Configuration of the ratio sampler, and the plans made from it."""

import numpy as np
import pytest

from cat_fast.data.sampling.balanced_plan import BalancedPlan
from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.data.sampling.ratio_sampler import RatioSamplerConfig, make_plan
from cat_fast.data.sampling.step_plan import PerRankPlan
from cat_fast.errors import UserError

MIX = {8: 4, 16: 20, 32: 16}
COSTS = CostTable(costs={8: Cost(0, 1153), 16: Cost(0, 592), 32: Cost(0, 497)})


def plan_of(shares=MIX, world_size=2, seed=0, **config):
    return make_plan(RatioSamplerConfig(**config), shares, 4, world_size, seed, COSTS)


def test_the_mode_chooses_the_plan():
    assert isinstance(plan_of(), PerRankPlan)
    assert isinstance(plan_of(mode="balanced"), BalancedPlan)


def test_per_rank_ratios_are_drawn_from_the_mix_reproducibly():
    """Resumed runs rely on the order of the ratios."""
    plan = plan_of(world_size=3, seed=5)
    for step in range(40):
        drawn = np.random.default_rng([5, step]).choice([8, 16, 32], size=3, p=[0.1, 0.5, 0.4])
        assert plan.plan(step, {}) == [(ratio, 4) for ratio in drawn]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mode": "fair"}, "per_rank or balanced"),
        ({"cost_table": "costs.json"}, "only sampler.mode=balanced"),
        ({"mode": "balanced", "max_wait": 0.0}, "max_wait"),
        ({"pool": "some"}, "own_ratio or all"),
        ({"shares": {8: -1.0}}, "must be non-negative"),
    ],
)
def test_an_invalid_configuration_is_rejected(config, message):
    with pytest.raises(UserError, match=message):
        RatioSamplerConfig(**config)
