"""Fréchet distance: closed forms, torch-fidelity, rank-deficient and ill-conditioned covariances."""

import math

import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from cat_fast.errors import UserError
from cat_fast.evaluation.distances.frechet import frechet_distance, trace_sqrt_product
from cat_fast.evaluation.distances.statistics import FeatureStatistics, Gaussian


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(features):
    found = FeatureStatistics(features.shape[1])
    found.update(features)
    return found.gaussian()


def test_diagonal_covariances_have_the_closed_form():
    mean, a, b = torch.zeros(3).double(), torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 0.0, 0.0])
    first = Gaussian(mean, torch.diag(a.double()), None)
    second = Gaussian(mean + 2, torch.diag(b.double()), None)
    assert frechet_distance(first, second) == pytest.approx(12 + 5 + 9 - 2 * 3, rel=1e-14)


def test_equals_torch_fidelity():
    x, y = draw(300, 20).float(), (draw(250, 20, seed=1) * 1.3 + 0.2).float()
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)
    found = frechet_distance(gaussian(x), gaussian(y))
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)


@pytest.mark.parametrize("count", [3, 12, 40])
def test_fewer_images_than_features(count):
    """The square root of a singular matrix: against the factors themselves, which need no square root."""
    x, y = draw(count, 64), draw(count + 2, 64, seed=1)
    centred = [(z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y)]
    exact = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    found = trace_sqrt_product(gaussian(x).covariance, gaussian(y).covariance)
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("decades", [4, 8, 14])
def test_ill_conditioned_covariances(decades):
    """Against the closed form of commuting matrices, with eigenvalues over many decades."""
    basis = torch.linalg.qr(draw(50, 50)).Q
    a, b = (
        torch.logspace(0, -decades, 50, dtype=torch.float64)[order] for order in (slice(None), slice(25, 75))
    )
    b = torch.cat([b, torch.zeros(25, dtype=torch.float64)])
    found = trace_sqrt_product(basis * a @ basis.T, basis * b @ basis.T)
    assert found.item() == pytest.approx((a * b).sqrt().sum().item(), rel=1e-7)


def test_agrees_with_scipy_on_well_conditioned_matrices():
    first, second = gaussian(draw(500, 30)).covariance, gaussian(draw(500, 30, seed=1)).covariance
    expected = scipy.linalg.sqrtm((first @ second).numpy()).trace().real
    assert trace_sqrt_product(first, second).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [10, 300])
def test_identical_sets_are_within_a_millionth_of_the_trace(count):
    found = gaussian(draw(count, 100) * torch.logspace(0, -6, 100))
    assert abs(frechet_distance(found, found)) <= 1e-6 * found.covariance.trace().item()


@pytest.mark.parametrize("count", [2, 5, 64])
def test_equal_images_have_no_spread(count):
    """Covariances of rounding errors only, on which LAPACK's eigenvalue solver may fail."""
    equal, varied = gaussian(draw(1, 512).expand(count, 512) * 3), gaussian(draw(40, 512))
    expected = (equal.mean - varied.mean).square().sum() + varied.covariance.trace()
    assert frechet_distance(equal, varied) == pytest.approx(expected.item(), rel=1e-6)


def test_unusable_statistics_are_refused():
    mean, identity = torch.zeros(2).double(), torch.eye(2).double()
    good = Gaussian(mean, identity, None)
    skew = identity.clone()
    skew[0, 1] = 0.5
    for bad, message in (
        (Gaussian(mean, identity * torch.nan, None), "NaN"),
        (Gaussian(mean, skew, None), "not symmetric"),
        (Gaussian(mean, -identity, None), "negative variance"),
        (Gaussian(mean, torch.eye(3).double(), None), "2 x 2"),
        (Gaussian(torch.zeros(3).double(), torch.eye(3).double(), None), "2 and 3 features"),
    ):
        with pytest.raises(UserError, match=message):
            frechet_distance(good, bad)
