"""Mean and standard deviation per channel over images of any size, computed from parts of the data."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch


@dataclass(frozen=True)
class Moments:
    """Moments per channel in which every image weighs alike, whatever its number of values.

    They are mergeable without loss (Chan, Golub & LeVeque, 1979).
    """

    count: int
    """Number of images."""
    mean: Sequence[float]
    """Mean over images of the mean of an image."""
    squares: Sequence[float]
    """Sum over images of the mean squared deviation of an image's values from `mean`."""

    @classmethod
    def of(cls, values: Iterable[torch.Tensor]) -> Self:
        """Compute the moments of images or latents (c, ...) with the same channels, in float64."""
        flat = [value.flatten(1).double() for value in values]
        mean = torch.stack([one.mean(1) for one in flat]).mean(0)
        squares = torch.stack([(one - mean[:, None]).square().mean(1) for one in flat]).sum(0)
        return cls(len(flat), mean.tolist(), squares.tolist())

    @classmethod
    def by_group(cls, values: Iterable[tuple[int, torch.Tensor]]) -> dict[int, Self]:
        """Compute the moments of the tensors of each group, given as (group, tensor)."""
        groups: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        for group, value in values:
            groups[group].append(value)
        return {group: cls.of(members) for group, members in sorted(groups.items())}

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
        """Standard deviation per channel over all images."""
        return np.sqrt(np.array(self.squares) / self.count).tolist()


def per_channel(values: float | Sequence[float]) -> torch.Tensor:
    """Return one value, or one per channel, as (1, 1, 1) or (c, 1, 1), which broadcasts over (c, h, w)."""
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
