"""Fréchet distance between Gaussians (Heusel et al., 2017): FID, sFID and FD-DINOv2 by the features.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

The last trace is the sum of the singular values of C1^(1/2) C2^(1/2). Each square root comes from a symmetric
eigendecomposition, whose negative eigenvalues are rounding and become 0. The result is never complex, and
singular covariances, as of fewer images than features, need no added multiple of the identity.
"""

import torch
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.evaluation.distances.statistics import Gaussian


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Fréchet distance, as reported for FID.

    Raises:
        UserError: different numbers of features, NaN, or a covariance that is not symmetric.
    """
    for gaussian in (first, second):
        _check(gaussian)
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"statistics of {len(first.mean)} and {len(second.mean)} features cannot be compared: they are"
            " from different networks or layers"
        )
    squared = (first.mean - second.mean).square().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return float(squared + traces - 2 * trace_sqrt_product(first.covariance, second.covariance))


def trace_sqrt_product(first: Tensor, second: Tensor) -> Tensor:
    """Return tr (C1 C2)^(1/2) of two positive semidefinite matrices (D, D), float64."""
    return torch.linalg.svdvals(_root(first).T @ _root(second)).sum()


def _root(covariance: Tensor) -> Tensor:
    """Return A (D, rank) with A A^T = C."""
    scale = covariance.diagonal().max()
    if scale < torch.finfo(covariance.dtype).tiny:  # equal images
        return covariance.new_zeros(len(covariance), 0)
    symmetric = (covariance + covariance.T) / (2 * scale)
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:  # divide and conquer may fail on nearly equal eigenvalues
        vectors, values, _ = torch.linalg.svd(symmetric)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * (values[kept] * scale).sqrt()


def _check(gaussian: Gaussian) -> None:
    covariance = gaussian.covariance
    if covariance.shape != (len(gaussian.mean), len(gaussian.mean)):
        raise UserError(
            f"statistics: expected a covariance of {len(gaussian.mean)} x {len(gaussian.mean)}, got"
            f" {tuple(covariance.shape)}"
        )
    if not (torch.isfinite(covariance).all() and torch.isfinite(gaussian.mean).all()):
        raise UserError("statistics: NaN or infinite values")
    scale = covariance.diagonal().abs().max()
    if (covariance - covariance.T).abs().max() > 1e-3 * scale:
        raise UserError("statistics: the covariance is not symmetric")
    if covariance.diagonal().min() < 0:
        raise UserError("statistics: the covariance has a negative variance")
