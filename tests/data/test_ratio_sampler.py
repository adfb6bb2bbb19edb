"""Every picture once an epoch, at its ratio, and one plan that all ranks agree on."""

from collections import Counter

import pytest

from cat_fast.data.ratio_sampler import RatioSampler, RatioSamplerConfig
from cat_fast.errors import UserError

RATIOS = [8] * 4 + [16] * 20 + [32] * 16


def sampler(world_size=2, batch_size=4, seed=0, **config):
    return RatioSampler(RATIOS, batch_size, world_size, seed, RatioSamplerConfig(**config))


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


def test_restored_it_goes_on_as_if_never_stopped():
    straight, stopped = sampler(), sampler()
    for _ in range(7):
        straight.plan()
        stopped.plan()
    resumed = sampler()
    resumed.load_state_dict(stopped.state_dict())
    assert [resumed.plan() for _ in range(20)] == [straight.plan() for _ in range(20)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pool": "some"}, "own_ratio or all"),
        ({"shares": {8: -1.0}}, "no shares"),
        ({"shares": {4: 1.0}}, "ratio 4 has a share but no picture"),
    ],
)
def test_an_impossible_plan_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        sampler(**config)


def test_an_empty_index_is_refused():
    with pytest.raises(UserError, match="no pictures"):
        RatioSampler([], 4, 1, 0, RatioSamplerConfig())
