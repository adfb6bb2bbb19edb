"""Warnings about data, at a rate that a person can read."""

import logging
import threading
import time

_LOG = logging.getLogger("cat_fast.data")
MOST_A_MINUTE = 10


class Problems:
    """Logs where data could not be used and why: ten lines a minute, then how many were left out."""

    def __init__(self, most_a_minute: int = MOST_A_MINUTE) -> None:
        self.most = most_a_minute
        self.lock = threading.Lock()
        self.since = -60.0
        self.told = self.untold = 0

    def report(self, where: str, why: str) -> None:
        self._tell(f"{where} is skipped: {why}")

    def retrying(self, where: str, why: str, wait: float) -> None:
        self._tell(f"{where}: {why}; trying again in {wait:g} s")

    def _tell(self, message: str) -> None:
        with self.lock:
            now = time.monotonic()
            if now - self.since >= 60:
                if self.untold:
                    _LOG.warning("data: %d more problems in the minute before", self.untold)
                self.since, self.told, self.untold = now, 0, 0
            if self.told < self.most:
                self.told += 1
                _LOG.warning("data: %s", message)
            else:
                self.untold += 1
