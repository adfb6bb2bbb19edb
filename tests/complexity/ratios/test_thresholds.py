"""Thresholds, token counts and the budget equation, against the published figures."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_fast.complexity import (
    RatioThresholds,
    Score,
    average_latent_side,
    average_ratio,
    default_scorer,
    mean_tokens,
    ratio_mix,
    scored_by,
    tokens_per_image,
)
from cat_fast.complexity.ratios.policy import RatioPolicy
from cat_fast.errors import UserError

PUBLISHED = RatioThresholds(4, 7)


def mix(percent_8: float, percent_16: float, percent_32: float) -> dict[int, float]:
    return {8: percent_8 / 100, 16: percent_16 / 100, 32: percent_32 / 100}


def test_published_thresholds_split_the_scale() -> None:
    assert PUBLISHED.ratios(range(1, 10)) == [32, 32, 32, 32, 16, 16, 16, 8, 8]


@given(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), st.integers(1, 8))
def test_a_higher_score_never_gets_fewer_tokens(pair: list[int], score: int) -> None:
    thresholds = RatioThresholds(*pair)
    assert thresholds.ratio(score + 1) <= thresholds.ratio(score)


@pytest.mark.parametrize(("pair", "only"), [((9, 9), 32), ((0, 9), 16), ((0, 0), 8)])
def test_thresholds_at_the_ends_of_the_scale_give_a_single_ratio(pair: tuple[int, int], only: int) -> None:
    assert set(RatioThresholds(*pair).ratios(range(1, 10))) == {only}


@pytest.mark.parametrize(
    "pair", [(5, 4), (-1, 4), (4, 10), (5.5, 4.5), (float("nan"), 7), (4, float("inf")), (True, 7), ("4", 7)]
)
def test_thresholds_out_of_order_or_range_are_rejected(pair: tuple) -> None:
    with pytest.raises(UserError, match="0 <= a <= b <= 9"):
        RatioThresholds(*pair)


def test_thresholds_are_parsed_from_text() -> None:
    assert RatioThresholds.parse("4, 7") == PUBLISHED
    assert str(PUBLISHED) == "4,7"
    for real in (RatioThresholds(4.25, 7.5), RatioThresholds(4, 7.125), RatioThresholds(0.5, 9.5)):
        assert RatioThresholds.parse(str(real)) == real
    for text in ("4", "4,7,9", "low,high", ""):
        with pytest.raises(UserError, match="such as 4,7"):
            RatioThresholds.parse(text)


@pytest.mark.parametrize("score", [0, 10, 4.5, "4", None])
def test_scores_off_the_scale_are_rejected(score: object) -> None:
    with pytest.raises(UserError, match="from 1 to 9"):
        PUBLISHED.ratio(score)  # type: ignore[arg-type]


def test_numpy_scores_are_accepted() -> None:
    assert PUBLISHED.ratios(np.array([1, 9])) == [32, 8]


def test_tokens_at_512_px_are_the_published_ones() -> None:
    assert [tokens_per_image(ratio) for ratio in (8, 16, 32)] == [1024, 256, 64]


@pytest.mark.parametrize(("resolution", "patch_size"), [(256, 1), (128, 2), (768, 4)])
def test_halving_the_ratio_quadruples_the_tokens(resolution: int, patch_size: int) -> None:
    for ratio in (8, 16):
        fine, coarse = (tokens_per_image(f, resolution, patch_size) for f in (ratio, 2 * ratio))
        assert fine == 4 * coarse > 0


def test_error_for_indivisible_resolution_suggests_a_valid_multiple() -> None:
    with pytest.raises(UserError, match="multiple of 64 px"):
        tokens_per_image(32, resolution=500)
    with pytest.raises(UserError, match="one of 8, 16 and 32"):
        tokens_per_image(4)


def test_published_mix_costs_nearly_a_fixed_16x() -> None:
    # Section 3 of the paper: 10/48/42 % under (4, 7). By hand: 102.4 + 122.88 + 26.88.
    assert mean_tokens(mix(10, 48, 42)) == pytest.approx(252.16)
    assert mean_tokens(mix(10, 48, 42)) == pytest.approx(256, rel=0.05)
    assert mean_tokens(mix(0.5, 89.5, 10)) == pytest.approx(240.64)


@pytest.mark.parametrize(
    ("shares", "side"),
    [
        ((9, 54, 37), 31.87),
        ((6, 49, 45), 29.32),
        ((17, 83, 0), 39.29),
        ((96, 4, 0), 63.02),
        ((10, 54, 36), 32.43),
        ((0, 0, 100), 16),
    ],
)
def test_average_latent_side_is_the_published_root_mean_square(shares: tuple, side: float) -> None:
    # Shares are printed as integer percentages: half a percent of the 8x share moves the side by about 0.3.
    assert average_latent_side(mix(*shares)) == pytest.approx(side, abs=0.3)
    assert average_ratio(mix(*shares)) == pytest.approx(512 / side, rel=0.01)


@given(st.lists(st.sampled_from([8, 16, 32]), min_size=1))
def test_mean_tokens_follow_the_average_latent_side(ratios: list[int]) -> None:
    shares = ratio_mix(ratios)
    assert mean_tokens(shares) == pytest.approx(np.mean([tokens_per_image(f) for f in ratios]))
    assert mean_tokens(shares, patch_size=1) == pytest.approx(average_latent_side(shares) ** 2)


@pytest.mark.parametrize("broken", [{8: 0.5}, {8: 1.5, 16: -0.5}, {4: 1.0}, {}])
def test_invalid_mix_is_rejected(broken: dict) -> None:
    with pytest.raises(UserError):
        mean_tokens(broken)


def test_integral_floats_are_the_integers() -> None:
    """Tables and YAML store 4 as 4.0; equal thresholds must choose equal ratios."""
    assert (
        repr(RatioThresholds(4.0, np.float32(7)))
        == repr(RatioThresholds(np.int64(4), 7))
        == "RatioThresholds(4, 7)"
    )


def test_real_thresholds_apply_to_the_expected_score() -> None:
    near = Score.of_expected(4.4)  # rounds to 4
    assert [PUBLISHED.ratio_of(near), RatioThresholds(4.3, 7).ratio_of(near)] == [32, 16]
    assert RatioThresholds(4.3, 7).ratios([1, 4.3, 4.31, 7, 7.01, 9]) == [32, 32, 16, 16, 8, 8]
    for value in (0.9, 9.1, float("nan"), "4", True, None):
        with pytest.raises(UserError, match="from 1 to 9"):
            RatioThresholds(4.3, 7).ratio(value)  # type: ignore[arg-type]


def test_other_sets_of_ratios_have_one_threshold_less_than_ratios() -> None:
    four = RatioThresholds(2, 5, 8, ratios=(4, 8, 16, 32))
    assert four.ratios(range(1, 10)) == [32, 32, 16, 16, 16, 8, 8, 8, 4]
    assert four.mix([1, 3, 9, 9]) == {4: 0.5, 8: 0, 16: 0.25, 32: 0.25}
    assert RatioThresholds(5, ratios=(8, 32)).ratios([5, 6]) == [32, 8]
    assert eval(repr(four), {"RatioThresholds": RatioThresholds}) == four != RatioThresholds(2, 5)
    assert pickle.loads(pickle.dumps(four)) == four
    for values, ratios in (
        ((4, 7), (8, 16)),
        ((4,), (8, 16, 32)),
        ((), (16,)),
        ((4, 7), (32, 16, 8)),
        ((4,), (0, 8)),
    ):
        with pytest.raises(
            UserError, match=r"expected . thresholds|two or more positive integers in ascending order"
        ):
            RatioThresholds(*values, ratios=ratios)


def test_only_thresholds_for_the_ratios_of_the_tokenizer_are_stored() -> None:
    assert RatioThresholds(4, 7).pair == (4, 7)
    for use in (
        lambda t: t.pair,
        lambda t: RatioPolicy(("score",), t),
        lambda t: scored_by(default_scorer(), t),
    ):
        with pytest.raises(UserError, match="the tokenizer's ratios 8, 16, 32"):
            use(RatioThresholds(4, 7, ratios=(4, 8, 16)))
