"""Fit of integer thresholds to the budget equation: all pairs, average rate, the most diverse mix."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_fast.complexity import RatioThresholds, ScoreCounts, round_score
from cat_fast.complexity.rated_captions import RATED_CAPTIONS, read_rated
from cat_fast.errors import UserError

PUBLISHED_SHARES = {2: 0.10, 4: 0.32, 7: 0.48, 8: 0.095, 9: 0.005}
SPREAD_SHARES = {1: 4, 2: 6, 3: 12, 4: 20, 5: 18, 6: 16, 7: 14, 8: 9.5, 9: 0.5}
"""The same shares of scores up to 2, 4, 7 and 8, in percent, with all scores in use."""


@pytest.mark.parametrize("shares", [PUBLISHED_SHARES, SPREAD_SHARES], ids=["published", "spread"])
def test_published_distribution_lists_both_published_pairs_and_picks_the_more_diverse(shares) -> None:
    found = RatioThresholds.candidates(shares, target_ratio=16, resolution=512)
    listed = {candidate.thresholds: candidate for candidate in found}
    assert {RatioThresholds(4, 7), RatioThresholds(2, 8)} <= listed.keys()
    used, other = listed[RatioThresholds(4, 7)], listed[RatioThresholds(2, 8)]
    assert used.mix == pytest.approx({8: 0.10, 16: 0.48, 32: 0.42})
    assert other.mix == pytest.approx({8: 0.005, 16: 0.895, 32: 0.10})
    assert (used.mean_tokens, other.mean_tokens) == pytest.approx((252.16, 240.64))
    assert (used.average_ratio, other.average_ratio) == pytest.approx((16.121, 16.503), abs=5e-4)
    assert used.entropy == pytest.approx(-sum(p * math.log(p) for p in (0.10, 0.48, 0.42)))
    assert found[0].thresholds == RatioThresholds.fit(shares) == RatioThresholds(4, 7)
    assert [c.entropy for c in found] == sorted((c.entropy for c in found), reverse=True)


@given(
    st.dictionaries(st.integers(1, 9), st.integers(1, 50), min_size=1),
    st.sampled_from([12.5, 16, 20]),
    st.sampled_from([0.02, 0.05, 0.2]),
)
def test_candidates_are_all_pairs_within_the_tolerance(counts, target, tolerance) -> None:
    total, expected = sum(counts.values()), {}
    for a, b in itertools.combinations(range(1, 9), 2):
        n = Counter()
        for score, count in counts.items():
            n[32 if score <= a else 16 if score <= b else 8] += count
        rate = (sum(count / total / ratio**2 for ratio, count in n.items())) ** -0.5
        if abs(rate / target - 1) <= tolerance:
            shares = [count / total for count in n.values()]
            expected[a, b] = -sum(share * math.log(share) for share in shares)
    found = RatioThresholds.candidates(counts, target, tolerance=tolerance)
    assert {c.thresholds.pair: c.entropy for c in found} == pytest.approx(expected)
    if any(expected.values()):
        chosen = RatioThresholds.fit(counts, target, tolerance=tolerance)
        assert expected[chosen.pair] == pytest.approx(max(expected.values()))
    else:
        with pytest.raises(UserError):
            RatioThresholds.fit(counts, target, tolerance=tolerance)


def test_scores_counts_and_streams_give_the_same_candidates() -> None:
    counts = {score: int(2 * share) for score, share in SPREAD_SHARES.items()}
    scores = [score for score, count in counts.items() for _ in range(count)]
    shards = [ScoreCounts(), ScoreCounts()]
    for number, start in enumerate(range(0, len(scores), 7)):
        shards[number % 2].add(scores[start : start + 7])
    shards[0].merge(shards[1])
    every = [RatioThresholds.candidates(given) for given in (scores, iter(scores), counts, shards[0])]
    assert every == [every[0]] * 4
    assert every[0]


@pytest.mark.parametrize(
    ("source", "used", "near"),
    [
        ("coco", (215, 216), {(2, 8): (254, 255), (3, 7): (265, 266)}),
        ("coco_single_rating", (220, 221), {(2, 8): (256, 257), (3, 7): (268, 269)}),
        ("parti", (191, 192), {}),
        ("written", (330, 331), {}),
    ],
)
def test_costs_of_the_rated_captions(source, used, near) -> None:
    rated = read_rated(RATED_CAPTIONS.glob(f"{source}.jsonl*"))
    found = RatioThresholds.candidates([round_score(r.mean) for r in rated], tolerance=math.inf)
    tokens = {c.thresholds.pair: c.mean_tokens for c in found}
    assert used[0] <= tokens[4, 7] <= used[1]
    for pair, (low, high) in near.items():
        assert low <= tokens[pair] <= high
    if near:
        assert near.keys() <= {c.thresholds.pair for c in found if c.is_near(16, 0.05)}
        assert not next(c for c in found if c.thresholds.pair == (4, 7)).is_near(16, 0.05)


def test_other_sets_of_ratios_and_sizes() -> None:
    four = RatioThresholds.candidates(SPREAD_SHARES, 16, (512, 1024), 0.1, ratios=(4, 8, 16, 32))
    assert four
    for candidate in four:
        assert len(candidate.thresholds.values) == 3
        assert list(candidate.mix) == [4, 8, 16, 32]
        area = sum(share / f**2 for f, share in candidate.mix.items())
        assert candidate.average_ratio == pytest.approx(area**-0.5)
        assert candidate.mean_tokens == pytest.approx(512 * 1024 / 4 * area)
    two = RatioThresholds.fit(SPREAD_SHARES, 16, ratios=(8, 32), tolerance=0.1)
    assert two.ratio_set == (8, 32)


def test_errors_name_the_nearest_thresholds_and_the_range_that_can_be_reached() -> None:
    # 50 % at 32x, 20 % at 16x, 30 % at 8x: 0.5 / 4 + 0.2 + 0.3 * 4 = 1.525 times the tokens, 16 / sqrt(1.525)
    scores = [1] * 30 + [2, 8] * 20 + [9] * 30
    with pytest.raises(
        UserError, match=r"nearest are \(2,8\) at 12\.96x, 390\.4 tokens.*reach 10\.61x to 12\.96x"
    ):
        RatioThresholds.fit(scores)
    with pytest.raises(UserError, match="all images one ratio: their scores are 3, 5"):
        RatioThresholds.fit(iter([3, 5, 5]))
    for empty in ([], {}, {5: 0}, ScoreCounts()):
        with pytest.raises(UserError, match="no images"):
            RatioThresholds.fit(empty)
    for target in (7.9, 33, float("nan"), -16):
        with pytest.raises(UserError, match="expected 8 to 32"):
            RatioThresholds.fit(scores, target)
    with pytest.raises(UserError, match="tolerance"):
        RatioThresholds.candidates(scores, tolerance=float("nan"))
    with pytest.raises(UserError, match=r"got 4\.5; use.*within_budget"):
        RatioThresholds.fit([4, 4.5, 5])
    with pytest.raises(UserError, match="multiple of 64 px"):
        RatioThresholds.fit(scores, resolution=500)


@pytest.mark.parametrize(
    "scores", [[0], [10], [float("nan")], ["5"], [None], [True], {5: -1}, {5: float("nan")}, 5]
)
def test_invalid_scores_and_counts_are_refused(scores) -> None:
    with pytest.raises(UserError, match=r"from 1 to 9|must be finite"):
        ScoreCounts.of(scores)


def test_a_refused_batch_is_not_counted() -> None:
    counts = ScoreCounts({5: 2})
    with pytest.raises(UserError, match="got 10"):
        counts.add([4, 10])
    assert counts.to_dict() == {5: 2}
    counts.add([])
    assert counts.total == 2
