"""Steps in which no rank waits long: fewer images at dear ratios, more at cheap ones.

A rank still has one ratio a step. How many images it then takes is chosen once, for the whole run
(`choose_groups`): as many as fit one common time, where whole numbers of images allow that; where they do
not, ratios are split into groups, each with a time of its own, and a step is of one group. Which group, and
how many ranks at which of its ratios, follows from how far each ratio is behind its share of the images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cat_fast.data.sampling.cost_table import CostTable
from cat_fast.data.sampling.step_plan import RankShare, normalised

BATCH_TOLERANCE = 0.1
"""By how much a group's mean batch a rank may differ from the one asked for."""


@dataclass(frozen=True)
class Group:
    """Ratios that share a step, and the images of a rank at each."""

    counts: Mapping[int, int]
    wait: float
    """Expected share of its ranks' time that is spent waiting, by the cost table."""
    images: float
    """Expected images a rank."""


class BalancedPlan:
    """Every rank of a step has about the same predicted cost.

    The mix: after any step, a ratio has had its share of the images so far, give or take `drift`. Steps
    hold between `least` and `most` images.

    Args:
        shares: the mix, as shares of images.
        batch_size: images of a rank in a step, on average within BATCH_TOLERANCE.
        max_wait: the expected share of waiting that choosing the groups aims for.

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
        self.shares = normalised(shares)
        self.world_size, self.seed = world_size, seed
        costs.require(list(self.shares))
        self.groups = choose_groups(self.shares, batch_size, costs, max_wait)
        self.counts = {f: n for group in self.groups for f, n in group.counts.items()}

    @property
    def most(self) -> int:
        """The most images in a step."""
        return self.world_size * max(self.counts.values())

    @property
    def least(self) -> int:
        """The fewest."""
        return self.world_size * min(self.counts.values())

    @property
    def drift(self) -> int:
        """Images by which a ratio may be off its share: a few ranks', with several groups a few steps'.

        Who is most behind comes next, so nobody is ever ahead by more than what comes at once, nor behind by
        more than what all others can be ahead.
        """
        of_ranks = len(self.counts) * max(self.counts.values())
        return of_ranks if len(self.groups) == 1 else of_ranks + len(self.groups) * self.most

    def plan(self, step: int, drawn: Mapping[int, int]) -> list[RankShare]:
        total = sum(drawn.get(f, 0) for f in self.shares)
        behind = {f: share * total - drawn.get(f, 0) for f, share in self.shares.items()}
        group = max(self.groups, key=lambda group: sum(behind[f] for f in group.counts))
        parts = self._fill(group, behind)
        order = np.random.default_rng([self.seed, step, 0, 3]).permutation(self.world_size)
        return [parts[place] for place in order]

    def _fill(self, group: Group, behind: Mapping[int, float]) -> list[RankShare]:
        """One for each rank: one after another goes to the ratio most behind within the group."""
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
    """The fewest groups of ratios whose ranks are expected to wait no more than `max_wait` of their time.

    Among equally many, those that wait least. A ratio on its own never waits, so there is always an answer.
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
    """Counts for ratios that share a step: least waiting, with a mean batch within the tolerance.

    Candidates are the times that some ratio fills exactly with whole images.
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
    """All ways to split `items` into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in _partitions(rest):
        yield [[first], *smaller]
        for i, group in enumerate(smaller):
            yield [*smaller[:i], [first, *group], *smaller[i + 1 :]]
