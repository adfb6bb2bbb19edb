"""Intervals: coverage of known means, ratios of sums, and the jackknife of a mean."""

import numpy as np
import pytest

from cat_fast.evaluation.intervals import (
    group_jackknife,
    jackknife_over_images,
    mean_interval,
    ratio_interval,
)


def test_intervals_cover_the_mean_of_the_distribution():
    random = np.random.default_rng(0)
    found = [mean_interval(random.exponential(size=60), seed, 200) for seed in range(100)]
    covered = sum(one.low <= 1 <= one.high for one in found)
    assert 85 <= covered <= 99


def test_a_seed_gives_one_interval_and_the_width_is_that_of_the_normal():
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = mean_interval(values, 3)
    assert found == mean_interval(values, 3)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)


def test_ratios_weigh_images_by_their_denominators():
    found = ratio_interval([1, 0], [1, 3])
    assert found.value == 0.25
    assert (found.low, found.high) == (0.0, 1.0)
    assert ratio_interval([0.0], [0.0]) is None
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, np.nan])


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(2).normal(size=200)
    found = jackknife_over_images(200, lambda numbers: values[numbers].mean(), groups=200 // 2)
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx(values.std() / np.sqrt(200), rel=0.2)
    assert jackknife_over_images(19, lambda numbers: 0.0) is None
    assert group_jackknife(3.0, [3.0, 3.0]) == (3.0, 3.0, 3.0)
