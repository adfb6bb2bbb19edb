"""Regression on features of an image: linear in the frozen network's, a kernel on the low-level ones."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from cat_fast.complexity.image_scorers.student.features import Features


@dataclass(frozen=True)
class Standardization:
    """Shift and scale of features."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray) -> "Standardization":
        """Fit to rows of features, (N, D)."""
        return cls(values.mean(0), values.std(0) + 1e-6)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return standardized features, float64 of the same shape."""
        return (values.astype(np.float64) - self.mean) / self.std


@dataclass(frozen=True)
class RegressionArrays:
    """Arrays of a fitted `Regression`, as they are stored."""

    trunk_mean: np.ndarray
    trunk_std: np.ndarray
    low_mean: np.ndarray
    low_std: np.ndarray
    weights: np.ndarray
    """Of the standardized features of the network, (1920,)."""
    landmarks: np.ndarray
    """Standardized low-level features of the training images, (L, 27)."""
    coefficients: np.ndarray
    """Of the kernel at the landmarks, (L,)."""
    gamma: np.ndarray
    """Width of the kernel, ()."""
    intercept: np.ndarray

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "RegressionArrays":
        """Take the fields from stored arrays; raise KeyError if one is missing."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Regression:
    """A fitted regression from features to scores."""

    arrays: RegressionArrays

    def predict(self, features: Features) -> np.ndarray:
        """Return the predicted scores of images, float64 (N,), before calibration."""
        a = self.arrays
        trunk = Standardization(a.trunk_mean, a.trunk_std).apply(features.trunk)
        low = Standardization(a.low_mean, a.low_std).apply(features.low)
        return (
            trunk @ a.weights.astype(np.float64)
            + rbf_kernel(low, a.landmarks.astype(np.float64), float(a.gamma)) @ a.coefficients
            + float(a.intercept)
        )


def linear_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the inner products of rows, divided by their length, (N, M)."""
    return x @ y.T / x.shape[1]


def rbf_kernel(x: np.ndarray, y: np.ndarray, gamma: float) -> np.ndarray:
    """Return exp(-gamma |x - y|² / D) of rows of length D, (N, M)."""
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
    return np.exp(-gamma * np.maximum(squares, 0) / x.shape[1])
