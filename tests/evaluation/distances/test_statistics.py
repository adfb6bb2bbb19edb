"""Streamed statistics against numpy in float64, for any batch size, order and number of ranks."""

import numpy as np
import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.evaluation.distances import statistics
from cat_fast.evaluation.distances.statistics import FeatureStatistics


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 16)


def features(count=157, dim=5, offset=1e4):
    """Features far from the origin: sums of squares in float32, or without a shift, lose all digits."""
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(count, dim, generator=draw, dtype=torch.float64) * 0.01 + offset).float()


def streamed(x, batch_size):
    found = FeatureStatistics(x.shape[1])
    for batch in x.split(batch_size):
        found.update(batch)
    return found


def test_equals_numpy_in_float64():
    x = features()
    found = streamed(x, 7).gaussian()
    exact = x.double().numpy()
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-8, atol=1e-12)
    assert found.num_images == len(x)


@pytest.mark.parametrize("batch_size", [1, 16, 37, 157])
def test_batch_size_does_not_change_a_bit(batch_size):
    x = features()
    expected, found = streamed(x, 7).gaussian(), streamed(x, batch_size).gaussian()
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.covariance, expected.covariance)


def test_order_and_ranks_change_rounding_only():
    x = features(offset=10)
    expected = streamed(x, 8).gaussian()
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    ranks = [streamed(shuffled[rank::3], 5) for rank in range(3)]
    before = ranks[1].gaussian()
    for other in ranks[1:]:
        ranks[0].merge(other)
    found = ranks[0].gaussian()
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-11, atol=1e-16)
    assert torch.equal(ranks[1].gaussian().covariance, before.covariance)


def test_images_after_gaussian_and_after_merge_still_count():
    x = features()
    found = streamed(x[:50], 8)
    found.gaussian()
    found.merge(streamed(x[50:61], 3))
    found.update(x[61:])
    torch.testing.assert_close(found.gaussian().covariance, streamed(x, 157).gaussian().covariance)


def test_bad_features_are_refused():
    found = FeatureStatistics(3)
    with pytest.raises(UserError, match=r"shape \(B, 3\), got \(2, 4\)"):
        found.update(torch.zeros(2, 4))
    with pytest.raises(UserError, match="NaN"):
        found.update(torch.tensor([[1.0, torch.nan, 2.0]]))
    found.update(torch.zeros(1, 3))
    with pytest.raises(UserError, match="1 image"):
        found.gaussian()
