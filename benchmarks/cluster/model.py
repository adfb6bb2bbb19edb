"""Time of a training step on several ranks, and of a run with failures.

    step = slowest rank's computing + communication that is not hidden + waiting for data

On GPUs collectives hide behind the pass during which they run, up to its time (`overlap_comm`, which engines
set on several ranks): behind the backward pass the reduction of all buckets but the last, and under ZeRO 3
behind both passes the gathering of all large weights but the first bucket. On CPUs nothing overlaps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from benchmarks.cluster.zero import Exchange


class Link(Protocol):
    """Link between ranks."""

    def seconds(self, exchange: Exchange) -> float:
        """Return the time of all calls of an exchange."""
        ...


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Seconds per step of one engine's collectives."""

    exposed: float
    """Added to the step."""
    hidden: float
    """During the passes."""


def communicate(
    exchanges: Sequence[Exchange], link: Link, *, forward: float = 0.0, backward: float = 0.0
) -> Communication:
    """Return the time of collectives, of which some hide behind the seconds of computing of a pass."""
    exposed = hidden = 0.0
    for hidden_by, computing in ((None, 0.0), ("forward", forward), ("backward", backward)):
        seconds = sum(link.seconds(exchange) for exchange in exchanges if exchange.hidden_by == hidden_by)
        hidden += min(seconds, computing)
        exposed += max(0.0, seconds - computing)
    return Communication(exposed=exposed, hidden=hidden)


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Failures, checkpoints and restarts of a run."""

    hours_between: float
    """Mean time between failures of the complete run."""
    checkpoint_seconds: float
    """Time that a checkpoint stops the run."""
    interval_seconds: float
    """Time between checkpoints."""
    restart_seconds: float

    def hours(self, progress: float) -> dict[str, float]:
        """Return the expected hours and failures of a run of `progress` hours of steps.

        A failure loses half the time since a checkpoint, on average, and a restart.
        """
        checkpoints = progress * self.checkpoint_seconds / self.interval_seconds
        failures = (progress + checkpoints) / self.hours_between
        lost = failures * self.interval_seconds / 2 / 3600
        restarts = failures * self.restart_seconds / 3600
        return {
            "failures": failures,
            "lost_hours": lost,
            "restart_hours": restarts,
            "checkpoint_hours": checkpoints,
            "hours": progress + checkpoints + lost + restarts,
        }


def waiting_for_data(images: float, compute: float, rate: float) -> float:
    """Return the seconds per step beyond computing that loading `images` at a rate takes."""
    return max(0.0, images / rate - compute)


def slowest_of(costs: Mapping[int, float], shares: Mapping[int, float], ranks: int) -> float:
    """Return the expected cost of the slowest of ranks that draw their ratios independently."""
    levels = sorted((costs[ratio], share) for ratio, share in shares.items())
    cumulative = np.cumsum([share for _, share in levels]) / sum(shares.values())
    weights = np.diff(np.minimum(cumulative, 1.0) ** ranks, prepend=0.0)
    return float(sum(weight * cost for weight, (cost, _) in zip(weights, levels, strict=True)))
