"""Names the ranks that hold up the others: every step takes as long as the slowest rank's own part of it."""

import socket
import statistics
import sys

from cat_fast.training.config.settings import SlowRanksConfig
from cat_fast.training.runtime.ranks import Ranks

METRIC = "slowest_rank_over_median"


class SlowRanks:
    """Compares the ranks' own time (`Work.computed`), averaged over `every_steps`, with one small gather.

    A rank is slow at `factor` times the median of the others. Over a window, not a step: ranks draw different
    ratios, and one step says more about the ratio than about the rank.
    """

    def __init__(self, config: SlowRanksConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.steps = 0

    def after_step(self) -> dict[str, float]:
        """Collective. Metrics of a window that ends here, else none; rank 0 warns of slow ranks.

        The first step of a process is left out: it holds what happens once.
        """
        self.steps += 1
        if self.steps == 1:
            self.ranks.work.take_own_seconds()
        if self.steps % self.config.every_steps:
            return {}
        own = self.ranks.work.take_own_seconds()
        if self.ranks.world_size == 1:
            return {}
        told = self.ranks.gather((statistics.mean(own) if own else None, socket.gethostname()))
        seconds = {rank: mean for rank, (mean, _) in enumerate(told) if mean is not None}
        if len(seconds) < self.ranks.world_size:
            return {}
        over = {
            rank: mean / max(1e-9, statistics.median([s for r, s in seconds.items() if r != rank]))
            for rank, mean in seconds.items()
        }
        slowest = max(over, key=lambda rank: over[rank])
        if self.ranks.is_main:
            for rank in (r for r in over if over[r] > self.config.factor):
                print(
                    f"warning: rank {rank} ({told[rank][1]}) is slow: {seconds[rank]:.3f} s of its own "
                    f"a step, {over[rank]:.1f} times the others' median, in {self.config.every_steps} steps",
                    file=sys.stderr,
                    flush=True,
                )
        return {METRIC: over[slowest], "slowest_rank": float(slowest)}
