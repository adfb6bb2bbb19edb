"""Ratios within a token budget: never exceeded, optimal over all mixes, more tokens for complex images."""

import math
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_fast.complexity.ratios.budget import ratios_within_budget
from cat_fast.complexity.ratios.mix import tokens_per_image
from cat_fast.errors import UserError

ALL = (4, 8, 16, 32, 64)
TOKENS = {ratio: tokens_per_image(ratio, 512, ratios=ALL) for ratio in ALL}


@given(
    complexities=st.lists(st.floats(1, 9), min_size=1, max_size=6),
    mean=st.floats(64, 1200),
    ratios=st.sampled_from([(8, 16, 32), (16, 32), (8, 32), (16,), (4, 8, 16, 32), (4, 8, 32, 64)]),
    data=st.data(),
)
def test_result_is_the_best_mix_within_the_budget(complexities, mean, ratios, data):
    least = TOKENS[max(ratios)]
    if mean < least:
        with pytest.raises(UserError, match=f"expected at least {least}"):
            ratios_within_budget(complexities, mean, ratios=ratios)
        return
    preferred = data.draw(
        st.lists(st.sampled_from(ratios), min_size=len(complexities), max_size=len(complexities))
    )
    got = ratios_within_budget(complexities, mean, ratios=ratios, preferred=preferred)

    def cost(mix):
        return sum(TOKENS[ratio] for ratio in mix)

    def fair(mix):
        pairs = list(zip(complexities, mix, strict=True))
        return all(f <= g for c, f in pairs for d, g in pairs if c > d)

    budget = mean * len(complexities)
    affordable = [
        mix for mix in product(ratios, repeat=len(complexities)) if fair(mix) and cost(mix) <= budget + 1e-6
    ]
    assert fair(got)
    assert cost(got) == max(map(cost, affordable))


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
