"""Retries with exponential backoff, up to a minute."""

import time

from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.problems import ProblemLog

MAX_WAIT = 60.0


class Retries:
    """State of one operation's attempts, at most `config.attempts` in a row.

    Args:
        where: name of the shard or file in warnings.
    """

    def __init__(self, config: StreamConfig, problems: ProblemLog, where: str) -> None:
        self.config, self.problems, self.where = config, problems, where
        self.succeeded()

    def succeeded(self) -> None:
        """Reset the counter and the wait."""
        self.failures, self.wait = 0, self.config.first_wait

    def failed(self, reason: str) -> bool:
        """Wait before the next attempt; return False immediately if none is left."""
        self.failures += 1
        if self.failures == self.config.attempts:
            return False
        self.problems.retrying(self.where, reason, self.wait)
        time.sleep(self.wait)
        self.wait = min(2 * self.wait, MAX_WAIT)
        return True
