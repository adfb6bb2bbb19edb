"""Ratios within a token budget: never exceeded, optimal over all mixes, more tokens for complex images."""

import math
from collections import Counter
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_fast.complexity.ratios.budget import ratios_within_budget
from cat_fast.complexity.ratios.mix import tokens_per_image
from cat_fast.errors import UserError

ALL = (4, 8, 16, 32, 64)
TOKENS = {ratio: tokens_per_image(ratio, 512, ratios=ALL) for ratio in ALL}


@pytest.mark.filterwarnings("error")
def test_no_images_have_no_ratios():
    assert ratios_within_budget([], 197, preferred=[]) == []


@settings(deadline=None)
@given(
    complexities=st.lists(st.floats(1, 9), min_size=1, max_size=6),
    mean=st.floats(64, 1200),
    ratios=st.sampled_from([(8, 16, 32), (16, 32), (8, 32), (16,), (4, 8, 16, 32), (4, 8, 32, 64)]),
    data=st.data(),
)
def test_result_is_the_best_of_all_mixes_within_the_budget(complexities, mean, ratios, data):
    least = TOKENS[max(ratios)]
    if mean < least:
        with pytest.raises(UserError, match=f"expected at least {least}"):
            ratios_within_budget(complexities, mean, ratios=ratios)
        return
    preferred = data.draw(
        st.lists(st.sampled_from(ratios), min_size=len(complexities), max_size=len(complexities))
    )
    got = ratios_within_budget(complexities, mean, ratios=ratios, preferred=preferred)

    order = sorted(range(len(complexities)), key=lambda i: (-complexities[i], i))  # ties: earlier ones first
    fair = [
        [ratio for _, ratio in sorted(zip(order, mix, strict=True))]
        for mix in combinations_with_replacement(sorted(ratios), len(complexities))
    ]
    check_best(got, fair, mean * len(complexities), preferred)


@settings(deadline=None)
@given(count=st.integers(5, 20), data=st.data())
def test_of_mixes_that_cost_the_same_the_preferred_one_is_chosen(count, data):
    """From five images on, there are several: one at 8x and four at 32x cost as much as five at 16x."""
    fair = list(map(list, combinations_with_replacement((8, 16, 32), count)))
    budget = cost(data.draw(st.sampled_from(fair)))
    preferred = data.draw(st.sampled_from(fair) | st.lists(st.sampled_from((8, 16, 32)), min_size=20))
    got = ratios_within_budget(range(count, 0, -1), budget / count, preferred=preferred)
    check_best(got, fair, budget, preferred)


def cost(mix):
    return sum(TOKENS[ratio] for ratio in mix)


def check_best(got, mixes, budget, preferred):
    """Check that `got` is the best mix: in order, by cost, agreement with `preferred`, and entropy."""

    def agreement(mix):
        return sum(map(int.__eq__, mix, preferred))

    affordable = [mix for mix in mixes if cost(mix) <= budget + 1e-6]
    highest = max(map(cost, affordable))
    full = [mix for mix in affordable if cost(mix) == highest]
    most = max(map(agreement, full))
    agreeing = [mix for mix in full if agreement(mix) == most]
    assert got in agreeing
    assert entropy(got) == pytest.approx(max(map(entropy, agreeing)))


DESCRIBED = st.tuples(st.floats(1, 9), st.sampled_from([8, 16, 32]))


@given(st.lists(DESCRIBED, min_size=1, max_size=40, unique_by=lambda pair: pair[0]))
def test_budget_met_exactly_by_preferred_ratios_returns_them(pairs):
    complexities = sorted(complexity for complexity, _ in pairs)
    preferred = sorted((ratio for _, ratio in pairs), reverse=True)
    mean = sum(TOKENS[ratio] for ratio in preferred) / len(pairs)
    assert ratios_within_budget(complexities, mean, preferred=preferred) == preferred


def entropy(mix):
    shares = [count / len(mix) for count in Counter(mix).values()]
    return -sum(share * math.log(share) for share in shares)


@given(count=st.integers(1, 24), mean=st.floats(64, 1024))
def test_without_preferred_ratios_the_mix_is_the_most_diverse_of_its_cost(count, mean):
    got = ratios_within_budget(range(count), mean)
    assert got == sorted(got, reverse=True)
    mixes = [
        [8] * low + [16] * middle + [32] * (count - low - middle)
        for low in range(count + 1)
        for middle in range(count - low + 1)
    ]
    cost = sum(TOKENS[ratio] for ratio in got)
    alike = [mix for mix in mixes if sum(TOKENS[ratio] for ratio in mix) == cost]
    assert entropy(got) == pytest.approx(max(map(entropy, alike)))


def test_the_budget_of_a_fixed_16x_uses_all_ratios():
    """Near the paper's 10 / 48 / 42 %; 16x for every image would cost the same."""
    shares = Counter(ratios_within_budget(range(1000), 256))
    assert shares == {8: 125, 16: 375, 32: 500}


def test_50_000_images_meet_the_published_budget_almost_exactly():
    complexities = [(7919 * i) % 50_000 for i in range(50_000)]
    mean = sum(TOKENS[ratio] for ratio in ratios_within_budget(complexities, 216)) / 50_000
    assert 216 - 192 / 50_000 <= mean <= 216


@pytest.mark.parametrize("budget", [63.9, float("nan"), -1])
def test_budget_too_small_for_one_image_is_rejected(budget):
    with pytest.raises(UserError, match="mean_tokens"):
        ratios_within_budget([1, 2], budget)
