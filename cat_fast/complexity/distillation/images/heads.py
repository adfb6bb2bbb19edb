"""Heads on frozen features: sums of kernels, of which ridge regression is the linear case."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import scipy.linalg

from cat_fast.complexity.distillation.images.image_data import ImageData
from cat_fast.complexity.image_scorers.student.model import (
    Regression,
    RegressionArrays,
    Standardization,
    linear_kernel,
    rbf_kernel,
)

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridge penalties, of which inner folds choose one."""
GAMMA = 0.5
"""Width of the kernels."""


class Term(NamedTuple):
    """A kernel on one set of features."""

    features: Literal["trunk", "low"]
    kind: Literal["linear", "rbf"]
    weight: float = 1.0


@dataclass(frozen=True)
class KernelHead:
    """A sum of kernels.

    Args:
        extra_weight: weight of an image without ratings in the fit, relative to one with ratings; 0 leaves
            such images out.
    """

    terms: Sequence[Term]
    extra_weight: float = 0.0

    def predict(self, data: ImageData, fitted: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """Fit on some images with every penalty; return the predictions for others, (P, M).

        Args:
            fitted, asked: indices of images.
        """
        gram_fit, gram_ask = self._grams(data, fitted, asked)
        weights = self._weights(data, fitted)
        mean = np.average(data.targets[fitted], weights=weights)
        residual = data.targets[fitted] - mean
        return np.stack([gram_ask @ _solve(gram_fit, residual, weights, p) + mean for p in PENALTIES])

    def rows(self, data: ImageData, rows: np.ndarray) -> np.ndarray:
        """Return the rows that the fit uses."""
        return rows if self.extra_weight > 0 else rows[data.rated[rows]]

    def fit(self, data: ImageData, penalty: float) -> Regression:
        """Fit to all images.

        Raises:
            ValueError: the terms are not those of `Regression`: linear on the trunk, a kernel on the rest.
        """
        linear, kernel = self.terms
        if (linear.features, linear.kind, kernel.features, kernel.kind) != ("trunk", "linear", "low", "rbf"):
            raise ValueError(f"expected a linear term and a kernel, got {self.terms}")
        rows = self.rows(data, np.arange(len(data.targets)))
        gram, _ = self._grams(data, rows, rows[:0])
        weights = self._weights(data, rows)
        mean = np.average(data.targets[rows], weights=weights)
        dual = _solve(gram, data.targets[rows] - mean, weights, penalty)
        trunk, low = (
            Standardization.fit(values[rows].astype(np.float64))
            for values in (data.features.trunk, data.features.low)
        )
        primal = linear.weight * dual @ trunk.apply(data.features.trunk[rows]) / len(trunk.mean)
        return Regression(
            RegressionArrays(
                trunk_mean=trunk.mean.astype(np.float32),
                trunk_std=trunk.std.astype(np.float32),
                low_mean=low.mean.astype(np.float32),
                low_std=low.std.astype(np.float32),
                weights=primal.astype(np.float32),
                landmarks=low.apply(data.features.low[rows]).astype(np.float32),
                coefficients=(kernel.weight * dual).astype(np.float32),
                gamma=np.array(GAMMA, dtype=np.float32),
                intercept=np.array(mean, dtype=np.float32),
            )
        )

    def _grams(self, data: ImageData, fitted: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        fit, ask = np.zeros((len(fitted), len(fitted))), np.zeros((len(asked), len(fitted)))
        for term in self.terms:
            values = getattr(data.features, term.features)
            standard = Standardization.fit(values[fitted].astype(np.float64))
            x, y = standard.apply(values[fitted]), standard.apply(values[asked])
            if term.kind == "linear":
                fit += term.weight * linear_kernel(x, x)
                ask += term.weight * linear_kernel(y, x)
            else:
                fit += term.weight * rbf_kernel(x, x, GAMMA)
                ask += term.weight * rbf_kernel(y, x, GAMMA)
        return fit, ask

    def _weights(self, data: ImageData, rows: np.ndarray) -> np.ndarray:
        return np.where(data.rated[rows], 1.0, self.extra_weight)


def _solve(gram: np.ndarray, residual: np.ndarray, weights: np.ndarray, penalty: float) -> np.ndarray:
    """Return the dual coefficients of weighted kernel ridge regression."""
    return scipy.linalg.solve(gram + np.diag(penalty / weights), residual, assume_a="pos")
