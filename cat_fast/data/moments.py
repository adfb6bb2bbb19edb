"""Mean and standard deviation of data that is seen in pieces."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations, which merge without loss (Chan, Golub & LeVeque, 1979)."""

    count: int
    mean: float
    squares: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Self:
        """Of all elements of a tensor, in float64."""
        values = values.double()
        mean = values.mean()
        return cls(values.numel(), mean.item(), (values - mean).square().sum().item())

    @classmethod
    def merge(cls, parts: Iterable["Moments"]) -> Self:
        """Of the union of the parts."""
        count, mean, squares = 0, 0.0, 0.0
        for part in parts:
            total = count + part.count
            delta = part.mean - mean
            squares += part.squares + delta**2 * count * part.count / total
            mean += delta * part.count / total
            count = total
        return cls(count, mean, squares)

    @property
    def std(self) -> float:
        """Standard deviation of the population."""
        return math.sqrt(self.squares / self.count)
