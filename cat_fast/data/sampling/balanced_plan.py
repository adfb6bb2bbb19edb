"""Steps in which no rank waits long: fewer pictures at dear ratios, more at cheap ones.

A rank still has one ratio a step. How many pictures it then takes is chosen once, for the whole run
(`choose_groups`): as many as fit one common time, where whole numbers of pictures allow that; where they do
not, ratios are split into groups, each with a time of its own, and a step is of one group. Which group, and
how many ranks at which of its ratios, follows from how far each ratio is behind its share of the pictures.
"""

from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cat_fast.data.sampling.cost_table import CostTable
from cat_fast.data.sampling.step_plan import RankShare, normalised

BATCH_TOLERANCE = 0.1
"""By how much a group's mean batch a rank may differ from the one asked for."""
_ENDLESS = 2**62


@dataclass(frozen=True)
class Group:
    """Ratios that share a step, and the pictures of a rank at each."""

    counts: Mapping[int, int]
    wait: float
    """Expected share of its ranks' time that is spent waiting, by the cost table."""
    pictures: float
    """Expected pictures a rank."""


class BalancedPlan:
    """Every rank of a step has about the same predicted cost.

    The mix: after any step, a ratio has had its share of the pictures so far, give or take `drift`. With
    `epoch`, pictures by ratio, a step never crosses an epoch's end: the last few take what is left, and the
    mix over each epoch is exact. Steps hold between `least` and `most` pictures, those last ones fewer.

    Args:
        shares: the mix, as shares of pictures.
        batch_size: pictures of a rank in a step, on average within BATCH_TOLERANCE.
        max_wait: the expected share of waiting that choosing the groups aims for.
        epoch: pictures of each ratio in an epoch; None for an endless stream.

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
        epoch: Mapping[int, int] | None = None,
    ) -> None:
        self.shares = normalised(shares)
        self.world_size, self.seed = world_size, seed
        self.costs = costs.require(list(self.shares)).costs
        self.epoch = {f: epoch[f] for f in self.shares} if epoch else None
        self.groups = choose_groups(self.shares, batch_size, costs, max_wait)
        self.counts = {f: n for group in self.groups for f, n in group.counts.items()}

    @property
    def most(self) -> int:
        """The most pictures in a step."""
        return self.world_size * max(self.counts.values())

    @property
    def least(self) -> int:
        """The fewest, but for the last steps of an epoch."""
        return self.world_size * min(self.counts.values())

    @property
    def drift(self) -> int:
        """Pictures by which a ratio may be off its share: a few ranks', with several groups a few steps'.

        Who is most behind comes next, so nobody is ever ahead by more than what comes at once, nor behind by
        more than what all others can be ahead.
        """
        of_ranks = len(self.counts) * max(self.counts.values())
        return of_ranks if len(self.groups) == 1 else of_ranks + len(self.groups) * self.most

    def plan(self, step: int, drawn: Mapping[int, int]) -> list[RankShare]:
        left, position = self._epoch_position(drawn)
        total = sum(position.values())
        behind = {f: share * total - position[f] for f, share in self.shares.items()}
        group = self._most_behind(behind, left)
        parts = self._fill(group, behind, left) if group else self._last_pictures(left)
        order = np.random.default_rng([self.seed, step, 0, 3]).permutation(self.world_size)
        return [parts[place] for place in order]

    def _epoch_position(self, drawn: Mapping[int, int]) -> tuple[dict[int, int], dict[int, int]]:
        """Pictures of each ratio that are left in the epoch, and that it has had."""
        drawn = {f: drawn.get(f, 0) for f in self.shares}
        if self.epoch is None:
            return dict.fromkeys(self.shares, _ENDLESS), drawn
        # Ratios may be out of step after a run under another plan: the one furthest back says the epoch.
        number = min(drawn[f] // size for f, size in self.epoch.items())
        position = {f: drawn[f] - number * size for f, size in self.epoch.items()}
        return {f: max(0, size - position[f]) for f, size in self.epoch.items()}, position

    def _most_behind(self, behind: Mapping[int, float], left: Mapping[int, int]) -> Group | None:
        """Of the groups that can still fill a step; None if none can."""
        able = [
            group
            for group in self.groups
            if sum(left[f] // n for f, n in group.counts.items()) >= self.world_size
        ]
        return max(able, key=lambda group: sum(behind[f] for f in group.counts), default=None)

    def _fill(self, group: Group, behind: Mapping[int, float], left: Mapping[int, int]) -> list[RankShare]:
        """One for each rank: one after another goes to the ratio most behind within the group."""
        total = sum(self.shares[f] for f in group.counts)
        within = {f: self.shares[f] / total for f in group.counts}
        all_behind = sum(behind[f] for f in group.counts)
        lag = {f: behind[f] - share * all_behind for f, share in within.items()}
        room = {f: left[f] // n for f, n in group.counts.items()}
        parts = []
        for _ in range(self.world_size):
            f = max((f for f in lag if room[f]), key=lag.__getitem__)
            n = group.counts[f]
            parts.append(RankShare(f, n))
            room[f] -= 1
            for other, share in within.items():
                lag[other] += share * n
            lag[f] -= n
        return parts

    def _last_pictures(self, left: Mapping[int, int]) -> list[RankShare]:
        """What is left of an epoch, too little for a step of any group, spread evenly over the ranks."""
        slots: list[tuple[float, int, int]] = []  # (cost, ratio, count), the dearest last
        for f, pictures in left.items():
            for count in _evenly(pictures, -(-pictures // self.counts[f])):
                insort(slots, (self.costs[f](count), f, count))
        parts: list[RankShare] = []
        while slots and len(parts) + len(slots) < self.world_size:  # there are ranks to share with
            _, f, count = slots.pop()
            if count == 1:
                parts.append(RankShare(f, 1))
                continue
            for half in _evenly(count, 2):
                insort(slots, (self.costs[f](half), f, half))
        parts += [RankShare(f, count) for _, f, count in reversed(slots)]
        idle = min(parts, key=lambda part: self.costs[part.ratio](1))._replace(pictures=0)
        # What is too much for one step stays for the next.
        return (parts + [idle] * self.world_size)[: self.world_size]


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

    Candidates are the times that some ratio fills exactly with whole pictures.
    """
    if len(shares) == 1:
        return Group(dict.fromkeys(shares, batch_size), 0.0, float(batch_size))
    best: Group | None = None
    for budget in sorted({costs.costs[f](n) for f in shares for n in range(1, 4 * batch_size + 1)}):
        counts = {f: costs.costs[f].pictures_within(budget) for f in shares}
        if min(counts.values()) < 1:
            continue
        ranks = {f: share / counts[f] for f, share in shares.items()}
        pictures = sum(shares.values()) / sum(ranks.values())
        if abs(pictures / batch_size - 1) > BATCH_TOLERANCE:
            continue
        mean = sum(ranks[f] * costs.costs[f](n) for f, n in counts.items()) / sum(ranks.values())
        group = Group(counts, 1 - mean / max(costs.costs[f](n) for f, n in counts.items()), pictures)
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


def _evenly(count: int, parts: int) -> list[int]:
    """`count` in `parts` whole numbers that differ by one at most."""
    return [count // parts + (i < count % parts) for i in range(parts)]
