"""Balanced steps: little waiting, the requested batch size, and the mix of the data."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_fast.data.sampling.balanced_plan import BalancedPlan, choose_groups
from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.data.sampling.step_plan import PerRankPlan
from cat_fast.errors import UserError

MIX = {8: 0.10, 16: 0.48, 32: 0.42}
PAPER = CostTable(costs={8: Cost(0, 1153), 16: Cost(0, 592), 32: Cost(0, 497)}, unit="flops")


def waiting(parts, costs):
    """Return the total time of all ranks, and the part of it spent waiting."""
    times = [costs.costs[part.ratio](part.images) for part in parts]
    return max(times) * len(times), max(times) * len(times) - sum(times)


@st.composite
def situations(draw):
    """Draw any valid mix (images by ratio), batch size, number of ranks and costs."""
    ratios = draw(st.lists(st.sampled_from((4, 8, 16, 32)), min_size=1, max_size=4, unique=True))
    images = {f: draw(st.integers(1, 400)) for f in sorted(ratios)}
    costs = {f: Cost(draw(st.floats(0, 5)), draw(st.floats(0.2, 5))) for f in ratios}
    return images, draw(st.integers(1, 12)), draw(st.integers(1, 16)), CostTable(costs=costs)


@settings(max_examples=100, deadline=None)
@given(situations(), st.integers(0, 3))
def test_steps_keep_the_mix_the_batch_and_the_wait(situation, seed):
    images, batch_size, ranks, costs = situation
    plan = BalancedPlan(images, batch_size, ranks, seed, costs)
    drawn: Counter = Counter()
    # Of each group, the ratio behind gets ranks one by one; of all groups, the one behind gets all ranks.
    counts = [count for group in plan.groups for count in group.counts.values()]
    smallest, largest = ranks * min(counts), ranks * max(counts)
    drift = len(images) * max(counts) + (len(plan.groups) * largest if len(plan.groups) > 1 else 0)
    assert (plan.min_images, plan.max_images, plan.drift) == (smallest, largest, drift)
    time = wait = 0.0
    steps = 200
    for step in range(steps):
        parts = plan.plan(step, drawn)
        assert len(parts) == ranks
        taken, waited = waiting(parts, costs)
        time, wait = time + taken, wait + waited
        for part in parts:
            drawn[part.ratio] += part.images
        total = sum(part.images for part in parts)
        assert smallest <= total <= largest
        done = sum(drawn.values())
        for f, count in images.items():
            assert abs(drawn[f] - count / sum(images.values()) * done) <= drift + 1e-6
    assert wait / time <= 0.025 + 0.01
    mean = done / steps / ranks / batch_size
    # The final deviation from the mix also changes the mean batch size.
    assert abs(mean - 1) <= 0.1 + drift / (steps * ranks)


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_with_the_costs_of_the_paper_all_ratios_share_a_step_and_ranks_wait_2_5_percent(ranks):
    plan = BalancedPlan(MIX, 8, ranks, 0, PAPER)
    assert plan.counts == {8: 4, 16: 8, 32: 9}
    assert plan.groups[0].wait == pytest.approx(0.0247, abs=1e-4)
    drawn: Counter = Counter()
    time = wait = 0.0
    for step in range(400):
        parts = plan.plan(step, drawn)
        taken, waited = waiting(parts, PAPER)
        time, wait = time + taken, wait + waited
        for part in parts:
            drawn[part.ratio] += part.images
            assert part.images == plan.counts[part.ratio]
        if ranks == 64:
            assert {part.ratio for part in parts} == {8, 16, 32}
    assert wait / time < 0.0248


def test_ratios_that_integer_batches_cannot_balance_take_turns():
    plan = BalancedPlan(MIX, 1, 8, 0, PAPER)
    assert [dict(group.counts) for group in plan.groups] == [{8: 1}, {16: 1}, {32: 1}]
    drawn: Counter = Counter()
    for step in range(50):
        parts = plan.plan(step, drawn)
        assert len({part.ratio for part in parts}) == 1
        for part in parts:
            drawn[part.ratio] += part.images
    assert drawn == {8: 40, 16: 192, 32: 168}


def test_a_larger_max_wait_combines_more_ratios():
    sizes = [len(choose_groups(MIX, 4, PAPER, limit)) for limit in (0.001, 0.028, 0.2)]
    assert sizes == [3, 2, 1]


@pytest.mark.parametrize("mode", ["per_rank", "balanced"])
def test_no_rank_is_always_at_the_same_ratio(mode):
    plan = PerRankPlan(MIX, 8, 4, 0) if mode == "per_rank" else BalancedPlan(MIX, 8, 4, 0, PAPER)
    drawn: Counter = Counter()
    seen: list[set[int]] = [set() for _ in range(4)]
    for step in range(60):
        for rank, part in enumerate(plan.plan(step, drawn)):
            drawn[part.ratio] += part.images
            seen[rank].add(part.ratio)
    assert seen == [{8, 16, 32}] * 4


@pytest.mark.parametrize("mode", ["per_rank", "balanced"])
def test_a_plan_is_a_function_of_step_and_counters(mode):
    def make(seed=0):
        return PerRankPlan(MIX, 8, 8, seed) if mode == "per_rank" else BalancedPlan(MIX, 8, 8, seed, PAPER)

    drawn = {8: 1000, 16: 4800, 32: 4207}
    assert make().plan(17, drawn) == make().plan(17, dict(drawn))
    assert make().plan(17, drawn) != make().plan(18, drawn)
    assert make().plan(17, drawn) != make(seed=1).plan(17, drawn)


def test_a_ratio_without_a_cost_is_rejected():
    with pytest.raises(UserError, match="ratio 4 is missing"):
        BalancedPlan({4: 0.5, 8: 0.5}, 4, 2, 0, PAPER)
