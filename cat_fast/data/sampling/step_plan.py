"""Step plans: ratio and number of images of each rank in a step.

A plan is a pure function of the step and of the number of images per ratio used before. It does not choose
images: a source takes the next ones of each ratio.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from cat_fast.integers import to_integer


class RankShare(NamedTuple):
    """One rank's share of a step."""

    ratio: int
    images: int
    """Number of images."""


class StepPlan(Protocol):
    """Planner of steps for all ranks; every rank computes the same plan."""

    shares: dict[int, float]
    """The mix: each ratio's share of the images, with sum 1."""
    counts: Mapping[int, int]
    """Largest number of images of a rank at each ratio."""

    def plan(self, step: int, drawn: Mapping[int, int]) -> list[RankShare]:
        """Return one share per rank for `step`, given the number of images `drawn` before it, by ratio."""
        ...


class PerRankPlan:
    """Plan of the paper: each rank draws a ratio from the mix, always with the same number of images.

    Ranks wait for the slowest one, which among many ranks is always one at the most expensive ratio.
    """

    def __init__(self, shares: Mapping[int, float], batch_size: int, world_size: int, seed: int) -> None:
        self.shares = normalise_shares(shares)
        self.batch_size, self.world_size, self.seed = batch_size, world_size, seed
        self.counts: Mapping[int, int] = dict.fromkeys(self.shares, batch_size)

    def plan(self, step: int, drawn: Mapping[int, int]) -> list[RankShare]:
        rng = np.random.default_rng([self.seed, step])
        ratios = rng.choice(list(self.shares), size=self.world_size, p=list(self.shares.values()))
        return [RankShare(int(f), self.batch_size) for f in ratios]


def normalise_shares(shares: Mapping[int, float]) -> dict[int, float]:
    """Return the positive shares, sorted by ratio and scaled to sum 1."""
    total = sum(shares.values())
    by_ratio = {to_integer("ratio", f): share for f, share in shares.items()}
    return {f: share / total for f, share in sorted(by_ratio.items()) if share > 0}
