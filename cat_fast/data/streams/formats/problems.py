"""Rate-limited warnings about unusable data."""

import logging
import threading
import time

_LOG = logging.getLogger("cat_fast.data")
MAX_PER_MINUTE = 10


class ProblemLog:
    """Log of unusable data: at most `max_per_minute` warnings, then the number of suppressed ones.

    What is read several times within a minute is reported once.
    """

    def __init__(self, max_per_minute: int = MAX_PER_MINUTE) -> None:
        self.max_per_minute = max_per_minute
        self.lock = threading.Lock()
        self.since = -60.0
        self.logged = self.suppressed = 0
        self.recent: set[str] = set()

    def report(self, where: str, why: str) -> None:
        """Warn that a sample, shard or line is skipped."""
        self._log(f"{where} is skipped: {why}")

    def retrying(self, where: str, why: str, wait: float) -> None:
        """Warn that an operation is repeated after `wait` seconds."""
        self._log(f"{where}: {why}; trying again in {wait:g} s")

    def _log(self, message: str) -> None:
        with self.lock:
            now = time.monotonic()
            if now - self.since >= 60:
                if self.suppressed:
                    _LOG.warning("data: %d more warnings were suppressed in the last minute", self.suppressed)
                self.since, self.logged, self.suppressed = now, 0, 0
                self.recent.clear()
            if message in self.recent:
                return
            if self.logged < self.max_per_minute:
                self.logged += 1
                self.recent.add(message)
                _LOG.warning("data: %s", message)
            else:
                self.suppressed += 1
