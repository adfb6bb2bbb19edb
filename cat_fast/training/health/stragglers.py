"""Straggler detection: name ranks that are slower than the others, as the slowest one sets the pace."""

import socket
import statistics
import sys

import torch
from torch import Tensor

from cat_fast.training.config.settings import SlowRanksConfig
from cat_fast.training.runtime.ranks import Ranks

METRIC = "slowest_rank_over_median"


class StragglerDetector:
    """Comparison of the ranks' busy times (see `StepContext`), averaged over windows of `every_steps` steps.

    A rank is slow if its mean is over `factor` times the median of the others. Single steps are not compared:
    ranks draw different ratios, which differ in cost. Collective: every rank must make one.
    """

    def __init__(self, config: SlowRanksConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.hosts = ranks.gather(socket.gethostname())
        self.steps = 0

    def busy_time(self) -> Tensor:
        """Return this rank's contribution to `compare`, to be summed over ranks after its part of the step.

        The first step of a process is left out, as it includes one-time work.

        Returns:
            (W,) with this rank's mean busy seconds per step at its index, if a window ends here; else empty.
        """
        self.steps += 1
        if self.steps == 1:
            self.ranks.step_context.pop_busy_seconds()
        if self.steps % self.config.every_steps:
            return torch.zeros(0, dtype=torch.float64)
        busy = self.ranks.step_context.pop_busy_seconds()
        if self.ranks.world_size == 1:
            return torch.zeros(0, dtype=torch.float64)
        seconds = torch.zeros(self.ranks.world_size, dtype=torch.float64)
        seconds[self.ranks.rank] = statistics.mean(busy) if busy else 0.0
        return seconds

    def compare(self, summed: Tensor) -> dict[str, float]:
        """Return the metrics of a window from the summed times, empty if no window ended.

        Rank 0 prints a warning for each slow rank.
        """
        seconds = summed.tolist()
        if not seconds or not all(seconds):
            return {}
        factors = [
            mean / max(1e-9, statistics.median([s for r, s in enumerate(seconds) if r != rank]))
            for rank, mean in enumerate(seconds)
        ]
        slowest = factors.index(max(factors))
        if self.ranks.is_main:
            for rank in (r for r, factor in enumerate(factors) if factor > self.config.factor):
                print(
                    f"warning: rank {rank} ({self.hosts[rank]}) is slow: busy {seconds[rank]:.3f} s per "
                    f"step, {factors[rank]:.1f} times the others' median, over {self.config.every_steps} "
                    "steps",
                    file=sys.stderr,
                    flush=True,
                )
        return {METRIC: factors[slowest], "slowest_rank": float(slowest)}
