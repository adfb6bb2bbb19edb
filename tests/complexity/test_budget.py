"""Ratios within a budget: never over it, as near as any mix, more to the more complex."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_fast.complexity.budget import ratios_within_budget
from cat_fast.complexity.ratio import tokens_per_image
from cat_fast.errors import UserError

TOKENS = {ratio: tokens_per_image(ratio, 512) for ratio in (8, 16, 32)}


@given(
    complexities=st.lists(st.floats(1, 9), min_size=1, max_size=7),
    mean=st.floats(64, 1200),
    ratios=st.sampled_from([(8, 16, 32), (16, 32), (8, 32), (16,)]),
    data=st.data(),
)
def test_it_is_the_best_of_all_mixes_that_the_budget_pays(complexities, mean, ratios, data):
    least = TOKENS[max(ratios)]
    if mean < least:
        with pytest.raises(UserError, match=f"costs {least} tokens at least"):
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
    paid = [
        mix for mix in product(ratios, repeat=len(complexities)) if fair(mix) and cost(mix) <= budget + 1e-6
    ]
    assert fair(got)
    assert cost(got) == max(map(cost, paid))


@given(st.lists(st.tuples(st.floats(1, 9), st.sampled_from([8, 16, 32])), min_size=1, max_size=40))
def test_a_budget_that_the_preferred_ratios_just_meet_gives_them_back(pairs):
    complexities = sorted(complexity for complexity, _ in pairs)
    preferred = sorted((ratio for _, ratio in pairs), reverse=True)
    mean = sum(TOKENS[ratio] for ratio in preferred) / len(pairs)
    got = ratios_within_budget(complexities, mean, preferred=preferred)
    # Equal complexities may change places.
    assert sorted(got) == sorted(preferred)
    if len(set(complexities)) == len(complexities):
        assert got == preferred


def test_fifty_thousand_images_meet_the_published_budget_nearly_to_the_token():
    complexities = [(7919 * i) % 50_000 for i in range(50_000)]
    mean = sum(TOKENS[ratio] for ratio in ratios_within_budget(complexities, 216)) / 50_000
    assert 216 - 192 / 50_000 <= mean <= 216


@pytest.mark.parametrize("budget", [63.9, float("nan"), -1])
def test_a_budget_that_pays_no_image_is_refused(budget):
    with pytest.raises(UserError, match="mean_tokens"):
        ratios_within_budget([1, 2], budget)
