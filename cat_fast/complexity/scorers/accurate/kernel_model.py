"""`KernelModel`: kernel ridge regression of the score on features of the frozen encoder.

Every rated caption of the fit is a landmark. The kernel is a Gaussian one of the features times a polynomial
of the flags. A second regression on the features infers the flags.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

STATES = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)], dtype=np.float32)
"""States of the flags (text, faces): -1 for absent, 1 for present."""
LINEAR, PRODUCT, ADDED = 0.5, 0.1, 0.5
"""Coefficients of the flags: two in the factor of the features' kernel, one in the kernel of flags alone."""


@dataclass(frozen=True)
class FeatureMap:
    """Standardization and projection of pooled states to features of unit mean square."""

    center: np.ndarray
    """Mean of each pooled state, float32 (K,)."""
    spread: np.ndarray
    """Standard deviation of each pooled state, float32 (K,)."""
    projection: np.ndarray
    """Columns that project standardized states, as integers, int8 (K, D)."""
    scale: np.ndarray
    """Unit of each column of `projection`, float32 (D,)."""

    @classmethod
    def fit(cls, pooled: np.ndarray, width: int) -> "FeatureMap":
        """Return the map onto the `width` largest principal components of standardized pooled states."""
        center, spread = pooled.mean(0), pooled.std(0) + np.float32(1e-6)
        standard = (pooled - center) / spread
        _, vectors = np.linalg.eigh(standard.T @ standard)
        columns = vectors[:, ::-1][:, :width]
        columns = columns / np.sqrt(((standard @ columns) ** 2).sum(1).mean())
        scale = np.abs(columns).max(0) / 127
        return cls(center, spread, _integers(columns / scale), scale.astype(np.float32))

    def __call__(self, pooled: np.ndarray) -> np.ndarray:
        """Return the features, float32 (N, D), of pooled states, float32 (N, K)."""
        return _product((pooled - self.center) / self.spread, self._columns)

    @cached_property
    def _columns(self) -> np.ndarray:
        return _aligned(self.projection * self.scale)


@dataclass(frozen=True)
class KernelModel:
    """Landmarks with weights per state of the flags."""

    features: FeatureMap
    landmarks: np.ndarray
    """Features of the rated captions in units of `UNIT`, int8 (M, D)."""
    weights: np.ndarray
    """Weights of the landmarks: of the score in each of `STATES`, and of the two flags; float32 (M, 6)."""
    intercepts: np.ndarray
    """float32 (6,)."""

    def similarities(self, pooled: np.ndarray) -> np.ndarray:
        """Return the kernel of the features with each landmark, float32 (N, M)."""
        return gaussian_kernel(self.features(pooled), self._points)

    def predict(self, pooled: np.ndarray) -> np.ndarray:
        """Return the score in each of `STATES`, then both flags' values -1 to 1, float32 (N, 6)."""
        # row by row: in a product as narrow as this one, MKL rounds a row by its position
        rows = [_product(row[None], self._weights) for row in self.similarities(pooled)]
        return np.concatenate(rows) + self.intercepts

    @cached_property
    def _points(self) -> np.ndarray:
        return _aligned(restore(self.landmarks))

    @cached_property
    def _weights(self) -> np.ndarray:
        return _aligned(self.weights)


UNIT = 1 / 80
"""Unit of stored features; the error is below 1 % of a feature vector's length."""


def store(features: np.ndarray) -> np.ndarray:
    """Round features to multiples of `UNIT`, int8."""
    return _integers(features / UNIT)


def restore(stored: np.ndarray) -> np.ndarray:
    """Return stored features as float32."""
    return stored * np.float32(UNIT)


def gaussian_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return exp(-|a_i - b_j|²), float32 (N, M)."""
    kernel = _product(a, b.T)
    kernel *= 2
    kernel -= (a * a).sum(1)[:, None]
    kernel -= (b * b).sum(1)
    np.minimum(kernel, 0, out=kernel)
    return np.exp(kernel, out=kernel)


def flag_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the factor of the features' kernel for states of the flags, (N, 2) and (M, 2) of -1 and 1."""
    both = (a[:, :1] * a[:, 1:]) @ (b[:, :1] * b[:, 1:]).T
    return 1 + LINEAR / 2 * (a @ b.T) + PRODUCT * both


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a @ b by torch: on some AMD processors numpy's OpenBLAS rounds a row by its position.

    MKL's rounding may depend on addresses, so a is copied to aligned memory; b should be aligned, too.
    """
    dtype = np.result_type(a, b)
    first, second = (x.astype(dtype, copy=False) for x in (a, b))
    return (torch.tensor(first) @ torch.from_numpy(second)).numpy()


def _aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy in memory of torch, which starts at multiples of 64 bytes."""
    return torch.tensor(array).numpy()


def _integers(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), -127, 127).astype(np.int8)
