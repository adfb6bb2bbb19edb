"""Time of a training step on several ranks, and of a run with failures.

    step    = slowest rank's computing + communication + waiting for data
    traffic = 2 P bytes per rank and engine under ZeRO 1 and 2 (reduce-scatter of gradients, all-gather of
              weights), 3 P under ZeRO 3 (weights twice), each times (ranks - 1) / ranks, in fp32

The presets do not overlap communication with the backward pass (`overlap_comm: false`), so it adds up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

FP32 = 4
TRAFFIC = {0: 2, 1: 2, 2: 2, 3: 3}
"""Volume per step by ZeRO stage, in sizes of the weights; stage 0 reduces and gathers the gradients."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Link between ranks."""

    bytes_per_second: float
    seconds_per_collective: float


def traffic_bytes(parameters: int, ranks: int, stage: int) -> float:
    """Return the bytes that a rank sends per step for one engine."""
    return TRAFFIC[stage] * FP32 * parameters * (ranks - 1) / ranks


def collectives(parameters: int, stage: int, bucket: int, layers: int) -> int:
    """Return the number of collectives per step of one engine.

    Args:
        parameters: trained parameters.
        stage: ZeRO stage; stage 3 gathers weights layer by layer, forward and backward.
        bucket: elements per bucket of gradients.
        layers: number of modules with weights.
    """
    reductions = ceil(parameters / bucket)
    return reductions + (2 * layers if stage == 3 else 1)


def communication(
    parameters: Sequence[int], ranks: int, stage: int, link: Link, bucket: int, layers: int
) -> float:
    """Return the seconds per step of all engines."""
    if ranks == 1:
        return 0.0
    return sum(
        traffic_bytes(count, ranks, stage) / link.bytes_per_second
        + collectives(count, stage, bucket, layers) * link.seconds_per_collective
        for count in parameters
    )


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

    @property
    def useful(self) -> float:
        """Share of time that makes progress: a failure loses half an interval and a restart, on average."""
        writing = self.checkpoint_seconds / (self.interval_seconds + self.checkpoint_seconds)
        lost = (self.interval_seconds / 2 + self.restart_seconds) / (3600 * self.hours_between)
        return max(0.0, 1 - writing) / (1 + lost)


def simulate_failures(failures: Failures, hours: float, seed: int = 0) -> float:
    """Return the hours that a run of `hours` of progress takes, with failures drawn from an exponential."""
    rng = np.random.default_rng(seed)
    cycle = failures.interval_seconds + failures.checkpoint_seconds
    needed, elapsed = hours * 3600, 0.0
    while needed > 0:
        time = rng.exponential(3600 * failures.hours_between)
        whole = needed / failures.interval_seconds * cycle
        if time >= whole:
            return (elapsed + whole) / 3600
        needed -= int(time // cycle) * failures.interval_seconds
        elapsed += time + failures.restart_seconds
    return elapsed / 3600


def waiting_for_data(images: float, compute: float, rate: float) -> float:
    """Return the seconds per step beyond computing that loading `images` at a rate takes."""
    return max(0.0, images / rate - compute)


def slowest_of(costs: Mapping[int, float], shares: Mapping[int, float], ranks: int) -> float:
    """Return the expected cost of the slowest of ranks that draw their ratios independently."""
    levels = sorted((costs[ratio], share) for ratio, share in shares.items())
    cumulative = np.cumsum([share for _, share in levels]) / sum(shares.values())
    weights = np.diff(np.minimum(cumulative, 1.0) ** ranks, prepend=0.0)
    return float(sum(weight * cost for weight, (cost, _) in zip(weights, levels, strict=True)))
