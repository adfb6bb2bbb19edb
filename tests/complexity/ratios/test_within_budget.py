"""Real-valued thresholds: any budget that can be reached is met to within one image and never exceeded."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_fast.complexity import (
    RATIOS,
    RatioThresholds,
    ScoreCounts,
    default_scorer,
    mean_tokens,
    scored_by,
    tokens_per_image,
)
from cat_fast.data.ratio_origin import RatioOrigin, ScoredBy, origins_from_json, origins_to_json
from cat_fast.errors import UserError

FOUR = (4, 8, 16, 32)


def total_tokens(thresholds: RatioThresholds, expected, ratios=RATIOS) -> int:
    return sum(tokens_per_image(f, ratios=ratios) for f in thresholds.ratios(expected))


@pytest.mark.parametrize("budget", [64, 65, 100, 197, 216, 256, 511.7, 1000, 1024])
@pytest.mark.parametrize("ratios", [RATIOS, FOUR, (8, 32)], ids=str)
def test_budgets_are_met_to_within_one_image(budget, ratios) -> None:
    expected = np.random.default_rng(0).uniform(1, 9, 2000)
    thresholds = RatioThresholds.within_budget(expected, budget, ratios=ratios)
    spare = budget * len(expected) - total_tokens(thresholds, expected, ratios)
    costs = [tokens_per_image(f, ratios=ratios) for f in ratios]
    assert 0 <= spare < min(a - b for a, b in itertools.pairwise(costs))
    assert thresholds.use_expected


def test_the_budget_of_a_fixed_16x_gives_the_most_diverse_mix() -> None:
    expected = np.random.default_rng(0).normal(5, 1, 1000)
    mix = RatioThresholds.within_budget(np.clip(expected, 1.001, 8.999), 256).mix(
        np.clip(expected, 1.001, 8.999)
    )
    assert mix == {8: 0.125, 16: 0.375, 32: 0.5}


SCORE = st.integers(2, 18).map(lambda half: half / 2)


@given(
    st.lists(SCORE, min_size=1, max_size=40), st.floats(64, 1100), st.sampled_from([RATIOS, FOUR, (8, 32)])
)
def test_equal_scores_get_equal_ratios_as_near_to_the_budget_as_possible(expected, budget, ratios) -> None:
    """Means of two raters: many ties. All divisions between different scores are compared."""
    thresholds = RatioThresholds.within_budget(expected, budget, ratios=ratios)
    cuts = [0.9, *sorted(set(expected))]
    costs = [tokens_per_image(f, ratios=ratios) for f in ratios]

    def cost(limits) -> int:
        return sum(costs[sum(score <= limit for limit in limits)] for score in expected)

    possible = [cost(c) for c in itertools.combinations_with_replacement(cuts, len(ratios) - 1)]
    affordable = [spent for spent in possible if spent <= budget * len(expected) + 1e-6]
    spent = total_tokens(thresholds, expected, ratios)
    assert spent in affordable
    assert spent > max(affordable) - min(a - b for a, b in itertools.pairwise(costs))


def test_the_budget_of_integer_thresholds_is_reached_on_integer_scores() -> None:
    scores = [1, 2, 3, 3, 4, 4, 5, 5, 5, 6, 6, 7, 8, 9] * 50
    for pair in ((4, 7), (2, 8), (3, 7)):
        budget = mean_tokens(RatioThresholds(*pair).mix(scores))
        found = RatioThresholds.within_budget(scores, budget)
        assert abs(mean_tokens(found.mix(scores)) - budget) < 192 / len(scores)


def test_order_batches_and_shards_do_not_change_the_thresholds() -> None:
    expected = np.random.default_rng(1).uniform(1, 9, 500).round(2)
    whole = RatioThresholds.within_budget(expected, 197)
    assert RatioThresholds.within_budget(expected[::-1].tolist(), 197) == whole
    counts = [ScoreCounts() for _ in range(3)]
    for shard, part in zip(counts, np.array_split(expected, 3), strict=True):
        for batch in np.array_split(part, 5):
            shard.add(batch)
    first, *others = counts
    for shard in others:
        first.merge(ScoreCounts(shard.to_dict()))
    assert first.total == 500
    assert RatioThresholds.within_budget(first, 197) == whole


def test_shares_of_a_distribution_are_accepted() -> None:
    shares = {2: 0.10, 4: 0.32, 7: 0.48, 8: 0.095, 9: 0.005}
    thresholds = RatioThresholds.within_budget(shares, 252.16)
    assert thresholds.mix(shares) == pytest.approx({8: 0.1, 16: 0.48, 32: 0.42})


def test_thresholds_are_stored_and_read_back() -> None:
    expected = np.random.default_rng(2).uniform(1, 9, 300)
    thresholds = RatioThresholds.within_budget(expected, 197)
    by = scored_by(default_scorer(), thresholds)
    stored = json.loads(json.dumps({"scorer": by.scorer, "version": by.version, "thresholds": by.thresholds}))
    assert ScoredBy.of(stored) == by
    assert RatioThresholds(*ScoredBy.of(stored).thresholds) == thresholds
    origin = RatioOrigin(source="score", scored_by=by, thresholds=thresholds.pair)
    assert origins_from_json(json.loads(json.dumps(origins_to_json({origin: 3})))) == {origin: 3}
    assert RatioThresholds.parse(str(thresholds)) == thresholds


@pytest.mark.parametrize("budget", [63.9, float("nan"), -1])
def test_budgets_that_cannot_be_reached_name_the_range(budget) -> None:
    with pytest.raises(UserError, match="at least 64: images of 512 px cost 64 tokens at 32x to 1024 at 8x"):
        RatioThresholds.within_budget([5], budget)
    with pytest.raises(UserError, match="images of 1024 x 512 px cost 128 tokens at 32x to 2048 at 8x"):
        RatioThresholds.within_budget([5], budget, resolution=(512, 1024))


def test_a_budget_above_the_lowest_ratio_is_not_spent() -> None:
    assert RatioThresholds.within_budget([1, 5, 9], 5000).ratios([1, 5, 9]) == [8, 8, 8]


def test_neighbouring_floats_are_separated() -> None:
    low = 4.3
    high = float(np.nextafter(low, 9))
    thresholds = RatioThresholds.within_budget([low, high], 160)  # one at 32x, one at 16x
    assert thresholds.ratios([low, high]) == [32, 16]
