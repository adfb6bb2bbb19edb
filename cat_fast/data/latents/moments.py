"""Mean and standard deviation per channel, computed from parts of the data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch


@dataclass(frozen=True)
class Moments:
    """Mean and sum of squared deviations per channel, mergeable without loss (Chan, Golub & LeVeque, 1979).

    `count` is the number of values per channel.
    """

    count: int
    mean: Sequence[float]
    squares: Sequence[float]

    @classmethod
    def of(cls, values: Iterable[torch.Tensor]) -> Self:
        """Compute the moments of tensors (c, ...) with the same channels, in float64."""
        merged = torch.cat([value.flatten(1) for value in values], dim=1).double()
        mean = merged.mean(1)
        squares = (merged - mean[:, None]).square().sum(1)
        return cls(merged.shape[1], mean.tolist(), squares.tolist())

    @classmethod
    def merge(cls, parts: Iterable["Moments"]) -> Self:
        """Return the moments of the union of `parts`."""
        first, *others = parts
        count, mean, squares = first.count, np.array(first.mean), np.array(first.squares)
        for part in others:
            total = count + part.count
            delta = np.array(part.mean) - mean
            squares += np.array(part.squares) + delta**2 * count * part.count / total
            mean += delta * part.count / total
            count = total
        return cls(count, mean.tolist(), squares.tolist())

    @property
    def std(self) -> list[float]:
        """Population standard deviation per channel."""
        return np.sqrt(np.array(self.squares) / self.count).tolist()


def per_channel(values: float | Sequence[float]) -> torch.Tensor:
    """Return one value, or one per channel, as (1, 1, 1) or (c, 1, 1), which broadcasts over (c, h, w)."""
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
