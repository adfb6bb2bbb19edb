"""The plan of a step: which ratio each rank trains at, and on how many images.

A plan is a pure function of the step and of the number of images of each ratio trained on before. It knows no
images: a source takes the next ones of each ratio as they come.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np


class RankShare(NamedTuple):
    """One rank's part of a step."""

    ratio: int
    images: int
    """Number of images."""


class StepPlan(Protocol):
    """Plans steps for all ranks at once; every rank comes to the same plan."""

    shares: dict[int, float]
    """The mix: each ratio's share of the images; they add up to 1."""

    def plan(self, step: int, drawn: Mapping[int, int]) -> list[RankShare]:
        """One share a rank for `step`, before which `drawn` images of each ratio were trained on."""
        ...


class PerRankPlan:
    """Each rank draws a ratio by the mix, and the same number of images whatever it drew: the paper's.

    Ranks wait for the slowest, which among many ranks is always one at the dearest ratio.
    """

    def __init__(self, shares: Mapping[int, float], batch_size: int, world_size: int, seed: int) -> None:
        self.shares = normalised(shares)
        self.batch_size, self.world_size, self.seed = batch_size, world_size, seed

    def plan(self, step: int, drawn: Mapping[int, int]) -> list[RankShare]:
        rng = np.random.default_rng([self.seed, step])
        ratios = rng.choice(list(self.shares), size=self.world_size, p=list(self.shares.values()))
        return [RankShare(int(f), self.batch_size) for f in ratios]


def normalised(shares: Mapping[int, float]) -> dict[int, float]:
    """Without those that are 0, adding up to 1, in the order of the ratios."""
    total = sum(shares.values())
    return {f: share / total for f, share in sorted(shares.items()) if share > 0}
