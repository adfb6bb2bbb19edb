"""Mean and covariance of feature vectors, streamed in float64.

Batches are collected into blocks of a fixed number of rows before they are added, so the result has the same
bits for any batch size. Blocks, and the statistics of ranks, are merged by the parallel formula of Chan,
Golub and LeVeque (1979), which does not subtract large sums from each other. Other orders of the images
differ by rounding only, about 1e-15 of the variance.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cat_fast.errors import UserError

BLOCK = 1024
"""Rows per block; a block of 2,048 features takes 16 MiB."""


class Gaussian(NamedTuple):
    """Mean and covariance of features."""

    mean: Tensor
    """(D,) float64."""
    covariance: Tensor
    """(D, D) float64."""
    num_images: int | None
    """None if unknown."""


class FeatureStatistics:
    """Accumulates (B, D) features into their mean and covariance.

    Args:
        dim: D, the number of features.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._block = torch.empty(BLOCK, dim, dtype=torch.float64)
        self._filled = 0

    @property
    def count(self) -> int:
        """Number of images so far."""
        return self._count + self._filled

    def update(self, features: Tensor) -> None:
        """Add the features of a batch, (B, D), of any floating dtype.

        Raises:
            UserError: another shape, or NaN or infinite features.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UserError(f"features: expected shape (B, {self.dim}), got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise UserError("features: NaN or infinite values; check the images and the network's weights")
        features = features.detach().to("cpu", torch.float64)
        while len(features):
            part = features[: BLOCK - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            features = features[len(part) :]
            if self._filled == BLOCK:
                self._flush()

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the images of another instance, such as another rank's, which is left unchanged."""
        if other.dim != self.dim:
            raise UserError(f"features: expected statistics of {self.dim} features, got {other.dim}")
        self._flush()
        self._scatter += other._scatter
        self._combine(other._count, other._mean)
        self.update(other._block[: other._filled])

    def gaussian(self) -> Gaussian:
        """Return mean and covariance, with divisor N - 1.

        Raises:
            UserError: fewer than two images.
        """
        self._flush()
        if self._count < 2:
            raise UserError(f"statistics of {self._count} image(s): at least 2 are required")
        return Gaussian(self._mean.clone(), self._scatter / (self._count - 1), self._count)

    def _flush(self) -> None:
        if self._filled:
            block = self._block[: self._filled]
            mean = block.mean(0)
            block -= mean  # in place: later features overwrite the block
            self._scatter.addmm_(block.T, block)
            count, self._filled = self._filled, 0
            self._combine(count, mean)

    def _combine(self, count: int, mean: Tensor) -> None:
        """Combine the means, once the other scatter matrix has been added."""
        total = self._count + count
        if total:
            delta = mean - self._mean
            self._scatter.addr_(delta, delta, alpha=self._count * count / total)
            self._mean += delta * (count / total)
            self._count = total
