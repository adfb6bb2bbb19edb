"""Every picture once an epoch, at its ratio, and one plan that all ranks agree on."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.data.sampling.ratio_sampler import MODES, RatioSampler, RatioSamplerConfig
from cat_fast.errors import UserError

RATIOS = [8] * 4 + [16] * 20 + [32] * 16
COSTS = CostTable(costs={4: Cost(0, 3000), 8: Cost(0, 1153), 16: Cost(0, 592), 32: Cost(0, 497)})


def sampler(world_size=2, batch_size=4, seed=0, ratios=RATIOS, **config):
    return RatioSampler(ratios, batch_size, world_size, seed, RatioSamplerConfig(**config), COSTS)


def test_each_picture_is_drawn_at_its_own_ratio():
    plan = sampler()
    for _ in range(50):
        for batch in plan.plan():
            assert {RATIOS[i] for i in batch.indices} == {batch.ratio}
            assert len(batch.indices) == 4


def test_no_picture_comes_up_twice_before_every_one_of_its_ratio_came_up_once():
    plan, drawn = sampler(), {8: [], 16: [], 32: []}
    for _ in range(60):
        for batch in plan.plan():
            drawn[batch.ratio].extend(batch.indices)
    for ratio, indices in drawn.items():
        size = RATIOS.count(ratio)
        assert len(indices) >= 2 * size
        for start in range(0, len(indices) - size + 1, size):
            assert len(set(indices[start : start + size])) == size


def test_ratios_come_up_in_the_mix_of_the_data():
    plan = sampler(world_size=8)
    counts = Counter(batch.ratio for _ in range(500) for batch in plan.plan())
    for ratio in (8, 16, 32):
        assert counts[ratio] / 4000 == pytest.approx(RATIOS.count(ratio) / len(RATIOS), abs=0.03)


def test_shares_and_a_common_pool_override_the_mix():
    plan = sampler(pool="all", shares={8: 1.0, 16: 0.0, 32: 1.0})
    batches = [batch for _ in range(200) for batch in plan.plan()]
    assert {b.ratio for b in batches} == {8, 32}
    assert {i for b in batches if b.ratio == 8 for i in b.indices} == set(range(len(RATIOS)))


def test_ranks_draw_different_ratios_and_different_pictures():
    plan = sampler(pool="all", shares={8: 1.0, 16: 1.0, 32: 1.0})
    mixed = 0
    for _ in range(50):
        first, second = plan.plan()
        mixed += first.ratio != second.ratio
        if first.ratio == second.ratio:
            assert first.indices != second.indices
    assert mixed > 20


@pytest.mark.parametrize("mode", MODES)
def test_restored_it_goes_on_as_if_never_stopped(mode):
    straight, stopped = sampler(mode=mode), sampler(mode=mode)
    for _ in range(7):
        straight.plan()
        stopped.plan()
    resumed = sampler(mode=mode)
    resumed.load_state_dict(stopped.state_dict())
    assert [resumed.plan() for _ in range(20)] == [straight.plan() for _ in range(20)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from((4, 8, 16, 32)), min_size=1, max_size=150),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 2),
)
def test_balanced_an_epoch_is_each_picture_exactly_once_at_its_ratio(ratios, world_size, batch_size, seed):
    plan = sampler(world_size, batch_size, seed, ratios, mode="balanced")
    orders = []
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < len(ratios):
            batches = plan.plan()
            assert len(batches) == world_size
            trained = [batch for batch in batches if batch.counts]
            for batch in batches:
                assert {ratios[i] for i in batch.indices} == {batch.ratio}
            for batch in trained:
                seen += batch.indices
        assert sorted(seen) == list(range(len(ratios)))
        orders.append(seen)
    if len(ratios) > 20:
        assert orders[0] != orders[1]


def test_an_idle_rank_runs_on_another_ranks_picture_which_does_not_count():
    plan = sampler(world_size=4, ratios=[8, 16], mode="balanced")
    batches = plan.plan()
    assert sorted(len(batch.indices) for batch in batches) == [1, 1, 1, 1]
    assert sorted(batch.counts for batch in batches) == [False, False, True, True]
    assert plan.state_dict() == {"step": 1, "drawn": {"8": 1, "16": 1}}


def test_with_shares_of_its_own_each_ratio_goes_through_its_pictures_alone():
    plan = sampler(world_size=4, pool="all", shares={8: 0.34, 16: 0.36, 32: 0.3}, mode="balanced")
    drawn: dict[int, list[int]] = {8: [], 16: [], 32: []}
    for _ in range(60):
        for batch in plan.plan():
            drawn[batch.ratio].extend(batch.indices)
    total = sum(map(len, drawn.values()))
    for ratio, share in {8: 0.34, 16: 0.36, 32: 0.3}.items():
        assert len(drawn[ratio]) / total == pytest.approx(share, abs=0.05)
        for start in range(0, len(drawn[ratio]) - len(RATIOS) + 1, len(RATIOS)):
            assert sorted(drawn[ratio][start : start + len(RATIOS)]) == list(range(len(RATIOS)))


def test_per_rank_no_rank_is_idle_and_pictures_are_drawn_as_it_always_did():
    """The order of pictures is part of what a resumed run relies on."""
    plan = sampler(world_size=3, seed=5)
    batches = [batch for _ in range(40) for batch in plan.plan()]
    assert all(batch.counts for batch in batches)
    drawn = dict.fromkeys((8, 16, 32), 0)
    rngs = [np.random.default_rng([5, step]) for step in range(40)]
    ratios = [f for rng in rngs for f in rng.choice([8, 16, 32], size=3, p=[0.1, 0.5, 0.4])]
    for batch, ratio in zip(batches, ratios, strict=True):
        pool = [i for i, f in enumerate(RATIOS) if f == ratio]
        for index in batch.indices:
            epoch, place = divmod(drawn[ratio], len(pool))
            order = np.random.default_rng([5, int(ratio), epoch]).permutation(len(pool))
            assert index == pool[order[place]]
            drawn[ratio] += 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mode": "fair"}, "per_rank or balanced"),
        ({"cost_table": "costs.json"}, "only sampler.mode=balanced"),
        ({"mode": "balanced", "max_wait": 0.0}, "max_wait"),
        ({"pool": "some"}, "own_ratio or all"),
        ({"shares": {8: -1.0}}, "no shares"),
        ({"shares": {4: 1.0}}, "ratio 4 has a share but no picture"),
        ({"shares": {2: 1.0}, "mode": "balanced"}, "lacks ratio 2"),
    ],
)
def test_an_impossible_plan_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        sampler(**config)


def test_an_empty_index_is_refused():
    with pytest.raises(UserError, match="no pictures"):
        RatioSampler([], 4, 1, 0, RatioSamplerConfig())
