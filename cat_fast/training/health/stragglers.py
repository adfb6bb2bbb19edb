"""Names the ranks that hold up the others: every step takes as long as the slowest rank's own part of it."""

import socket
import statistics
import sys

import torch
from torch import Tensor

from cat_fast.training.config.settings import SlowRanksConfig
from cat_fast.training.runtime.ranks import Ranks

METRIC = "slowest_rank_over_median"


class SlowRanks:
    """Comparison of the ranks' own time (`Work.computed`), averaged over `every_steps`; made by all ranks.

    A rank is slow at `factor` times the median of the others. Over a window, not a step: ranks draw different
    ratios, and one step says more about the ratio than about the rank.
    """

    def __init__(self, config: SlowRanksConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.hosts = ranks.gather(socket.gethostname())
        self.steps = 0

    def own_time(self) -> Tensor:
        """Return what the ranks have to sum in this step for `compare`, once this rank's own part is done.

        The first step of a process is left out: it holds what happens once.

        Returns:
            (W,) with this rank's mean seconds per step in its place, where a window ends here; else empty.
        """
        self.steps += 1
        if self.steps == 1:
            self.ranks.work.take_own_seconds()
        if self.steps % self.config.every_steps:
            return torch.zeros(0, dtype=torch.float64)
        own = self.ranks.work.take_own_seconds()
        if self.ranks.world_size == 1:
            return torch.zeros(0, dtype=torch.float64)
        seconds = torch.zeros(self.ranks.world_size, dtype=torch.float64)
        seconds[self.ranks.rank] = statistics.mean(own) if own else 0.0
        return seconds

    def compare(self, summed: Tensor) -> dict[str, float]:
        """Return the metrics of a window from the summed times, none if no window ended; rank 0 warns of slow
        ranks."""
        seconds = summed.tolist()
        if not seconds or not all(seconds):
            return {}
        over = [
            mean / max(1e-9, statistics.median([s for r, s in enumerate(seconds) if r != rank]))
            for rank, mean in enumerate(seconds)
        ]
        slowest = over.index(max(over))
        if self.ranks.is_main:
            for rank in (r for r, factor in enumerate(over) if factor > self.config.factor):
                print(
                    f"warning: rank {rank} ({self.hosts[rank]}) is slow: {seconds[rank]:.3f} s of its own "
                    f"a step, {over[rank]:.1f} times the others' median, in {self.config.every_steps} steps",
                    file=sys.stderr,
                    flush=True,
                )
        return {METRIC: over[slowest], "slowest_rank": float(slowest)}
