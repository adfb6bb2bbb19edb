"""Balanced step plan: fewer images at expensive ratios, more at cheap ones, so that ranks hardly wait.

A rank still has one ratio per step. Its number of images at each ratio is chosen once per run
(`choose_groups`), such that all ratios take about the same time. If integer batch sizes do not allow that,
ratios are split into groups with different times, and each step uses one group. The group of a step, and the
number of ranks per ratio, depend on how far each ratio is behind its share of the images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cat_fast.data.sampling.cost_table import CostTable
from cat_fast.data.sampling.step_plan import RankShare, normalise_shares

BATCH_TOLERANCE = 0.1
"""Maximum relative deviation of a group's mean batch size per rank from the requested one."""


@dataclass(frozen=True)
class Group:
    """Ratios that are combined in a step, and the number of images per rank at each."""

    counts: Mapping[int, int]
    wait: float
    """Expected share of rank time spent waiting, according to the cost table."""
    images: float
    """Expected number of images per rank."""


class BalancedPlan:
    """Plan in which all ranks of a step have about the same predicted cost.

    After any step, the images of each ratio so far match its share up to `drift` images. A step has between
    `min_images` and `max_images` images.

    Args:
        shares: the mix, as shares of images.
        batch_size: mean number of images per rank and step, within BATCH_TOLERANCE.
        max_wait: maximum expected share of time spent waiting, for `choose_groups`.

    Raises:
        UserError: the cost table lacks a ratio.
    """

    def __init__(
        self,
        shares: Mapping[int, float],
        batch_size: int,
        world_size: int,
        seed: int,
        costs: CostTable,
        max_wait: float = 0.025,
    ) -> None:
        self.shares = normalise_shares(shares)
        self.world_size, self.seed = world_size, seed
        costs.require(list(self.shares))
        self.groups = choose_groups(self.shares, batch_size, costs, max_wait)
        self.counts: Mapping[int, int] = {f: n for group in self.groups for f, n in group.counts.items()}

    @property
    def max_images(self) -> int:
        """Maximum number of images in a step."""
        return self.world_size * max(self.counts.values())

    @property
    def min_images(self) -> int:
        """Minimum number of images in a step."""
        return self.world_size * min(self.counts.values())

    @property
    def drift(self) -> int:
        """Maximum deviation of a ratio from its share, in images.

        The ratio that is furthest behind is always next. So no ratio is ever ahead by more than its images in
        one step, or behind by more than the others can be ahead together.
        """
        of_ranks = len(self.counts) * max(self.counts.values())
        return of_ranks if len(self.groups) == 1 else of_ranks + len(self.groups) * self.max_images

    def plan(self, step: int, drawn: Mapping[int, int]) -> list[RankShare]:
        total = sum(drawn.get(f, 0) for f in self.shares)
        behind = {f: share * total - drawn.get(f, 0) for f, share in self.shares.items()}
        group = max(self.groups, key=lambda group: sum(behind[f] for f in group.counts))
        parts = self._assign_ratios(group, behind)
        order = np.random.default_rng([self.seed, step, 0, 2]).permutation(self.world_size)
        return [parts[place] for place in order]

    def _assign_ratios(self, group: Group, behind: Mapping[int, float]) -> list[RankShare]:
        """Return one share per rank; each next rank gets the ratio of the group that is furthest behind."""
        total = sum(self.shares[f] for f in group.counts)
        within = {f: self.shares[f] / total for f in group.counts}
        all_behind = sum(behind[f] for f in group.counts)
        lag = {f: behind[f] - share * all_behind for f, share in within.items()}
        parts = []
        for _ in range(self.world_size):
            f = max(lag, key=lag.__getitem__)
            n = group.counts[f]
            parts.append(RankShare(f, n))
            for other, share in within.items():
                lag[other] += share * n
            lag[f] -= n
        return parts


def choose_groups(
    shares: Mapping[int, float], batch_size: int, costs: CostTable, max_wait: float
) -> tuple[Group, ...]:
    """Return the smallest number of groups whose expected waiting time is at most `max_wait`.

    Among partitions of the same size, the one with the least waiting is chosen. A solution always exists,
    since a group of one ratio never waits.
    """
    found = []
    for parts in _partitions(list(shares)):
        groups = tuple(_best_counts({f: shares[f] for f in part}, batch_size, costs) for part in parts)
        if all(group.wait <= max_wait for group in groups):
            found.append(groups)

    def order(groups: tuple[Group, ...]) -> tuple[int, float]:
        wait = sum(group.wait * shares[f] for group in groups for f in group.counts)
        return len(groups), wait / sum(shares.values())

    return min(found, key=order)


def _best_counts(shares: Mapping[int, float], batch_size: int, costs: CostTable) -> Group:
    """Return the numbers of images with the least waiting whose mean batch size is within the tolerance.

    Candidate times are those that some ratio takes for an integer number of images.
    """
    if len(shares) == 1:
        return Group(dict.fromkeys(shares, batch_size), 0.0, float(batch_size))
    best: Group | None = None
    for budget in sorted({costs.costs[f](n) for f in shares for n in range(1, 4 * batch_size + 1)}):
        counts = {f: costs.costs[f].images_within(budget) for f in shares}
        if min(counts.values()) < 1:
            continue
        ranks = {f: share / counts[f] for f, share in shares.items()}
        images = sum(shares.values()) / sum(ranks.values())
        if abs(images / batch_size - 1) > BATCH_TOLERANCE:
            continue
        mean = sum(ranks[f] * costs.costs[f](n) for f, n in counts.items()) / sum(ranks.values())
        group = Group(counts, 1 - mean / max(costs.costs[f](n) for f, n in counts.items()), images)
        if best is None or group.wait < best.wait:
            best = group
    return best or Group(dict.fromkeys(shares, batch_size), 1.0, float(batch_size))


def _partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """Yield all partitions of `items` into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in _partitions(rest):
        yield [[first], *smaller]
        for i, group in enumerate(smaller):
            yield [*smaller[:i], [first, *group], *smaller[i + 1 :]]
