"""Division of images, ordered by complexity, into groups of one ratio each under a token budget."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Agreement = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Maps cuts, one array (N,) per cut, to the number of images that have the ratio preferred for them."""

_NEAR = 8
"""Positions to try on each side of the estimate of a cut, for cuts before the last two."""


def cut_within_budget(
    positions: np.ndarray,
    costs: Sequence[int],
    budget: float,
    *,
    slack: float = 0.0,
    agreement: Agreement | None = None,
    estimate: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """Return the cuts between groups whose total cost comes nearest to the budget without exceeding it.

    The first group holds the most complex images and has the highest cost per image. Among divisions within
    `slack` of the best total, the one with the most agreement is chosen, then the most diverse one, in which
    the shares of the groups have the largest entropy, then the one with the fewest images in the first group.

    For up to three groups all divisions are compared. For more, the cuts before the last two are tried near
    an estimate: the most diverse division without regard to positions, unless `estimate` is given.

    Args:
        positions: numbers of images at which a cut is allowed, ascending from 0 to all images, float64 (N,).
        costs: cost of an image per group, descending.
        budget: maximum total cost, at least that of all images in the last group.
        slack: total cost below the best at which divisions count as equally near.
        agreement: maps cuts to a number to maximize first.
        estimate: expected cuts.

    Returns:
        Indices into `positions`, ascending, one per cut.
    """
    steps = np.array([high - low for high, low in itertools.pairwise(costs)], dtype=np.float64)
    if not len(steps):
        return ()
    total = positions[-1]
    rounding = 1e-12 * max(budget, total * costs[0])
    spare = budget - total * costs[-1] + rounding
    if estimate is None and len(steps) > 2:
        estimate = _diverse_cuts(total, costs, budget)
    outer_cuts = list(_outer_cuts(positions, estimate, len(steps) - 2))

    def divide(outer: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        cuts = _divide(positions, steps, spare, outer)
        return cuts, steps @ positions[cuts]

    least = max(spent.max(initial=-np.inf) for _, spent in map(divide, outer_cuts)) - slack - rounding
    best: tuple[float, float] | None = None
    chosen: tuple[int, ...] = ()
    for cuts, spent in map(divide, outer_cuts):
        cuts = cuts[:, spent >= least]
        if not cuts.shape[1]:
            continue
        agreeing = np.zeros(cuts.shape[1]) if agreement is None else agreement(list(positions[cuts]))
        cuts = cuts[:, agreeing == agreeing.max()]
        entropy = _entropy(positions[cuts], total)
        most_diverse = int(np.argmax(entropy))
        key = float(agreeing.max()), float(entropy[most_diverse])
        if best is None or key > best:
            best, chosen = key, tuple(cuts[:, most_diverse].tolist())
    return chosen


def _outer_cuts(
    positions: np.ndarray, estimate: Sequence[float] | None, count: int
) -> Iterator[tuple[int, ...]]:
    """Yield the combinations to try of the first `count` cuts, as indices."""
    if count < 1 or estimate is None:
        yield ()
        return
    windows = []
    for cut in estimate[:count]:
        nearest = int(np.searchsorted(positions, cut))
        windows.append(range(max(0, nearest - _NEAR), min(len(positions), nearest + _NEAR + 1)))
    # The first is always affordable: no image before the last two cuts.
    combinations = itertools.chain([(0,) * count], itertools.product(*windows))
    yield from (cuts for cuts in combinations if list(cuts) == sorted(cuts))


def _divide(positions: np.ndarray, steps: np.ndarray, spare: float, outer: tuple[int, ...]) -> np.ndarray:
    """Return all divisions with the given first cuts that spend as much as possible, as indices (cuts, N)."""
    for cut, step in zip(outer, steps, strict=False):
        spare -= step * positions[cut]
    start = outer[-1] if outer else 0
    if len(steps) == 1:
        last = np.searchsorted(positions, [spare / steps[0]], side="right") - 1
        return last[None]
    first = np.arange(start, len(positions))
    affordable = (spare - steps[-2] * positions[first]) / steps[-1]
    last = np.searchsorted(positions, affordable, side="right") - 1
    kept = last >= first
    first, last = first[kept], last[kept]
    return np.stack([*(np.full(len(first), cut) for cut in outer), first, last])


def _diverse_cuts(total: float, costs: Sequence[int], budget: float) -> list[float]:
    """Return the cuts of the division with the largest entropy and the given total cost, not rounded.

    Its shares are proportional to exp(-λ cost); bisection finds λ.
    """
    relative = (np.asarray(costs, dtype=np.float64) - costs[-1]) / (costs[0] - costs[-1])
    wanted = min(max((budget / total - costs[-1]) / (costs[0] - costs[-1]), 0.0), 1.0)

    def shares(rate: float) -> np.ndarray:
        weights = np.exp(-rate * relative - np.max(-rate * relative))
        return weights / weights.sum()

    low, high = -500.0, 500.0
    for _ in range(100):
        rate = (low + high) / 2
        low, high = (rate, high) if shares(rate) @ relative > wanted else (low, rate)
    return (np.cumsum(shares(high))[:-1] * total).tolist()


def _entropy(cuts: np.ndarray, total: float) -> np.ndarray:
    """Return the entropy in nats of the groups' shares, (N,); it does not depend on their order."""
    bounds = np.concatenate([np.zeros((1, cuts.shape[1])), cuts, np.full((1, cuts.shape[1]), total)])
    shares = np.sort(np.diff(bounds, axis=0), axis=0) / total
    return -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0).sum(axis=0)
