"""A device and a host with clocks that only tests advance, to count how long the device has nothing to do."""

import threading
from collections import defaultdict


class FakeDevice:
    """A device that runs what is launched in order, and one clock per host thread. Nothing sleeps."""

    def __init__(self) -> None:
        self.busy = self.idle = 0.0
        self._free_at = 0.0
        self._host: defaultdict[int, float] = defaultdict(float)

    def work(self, seconds: float) -> None:
        """Let the calling thread of the host work."""
        self._host[threading.get_ident()] += seconds

    def launch(self, seconds: float) -> float:
        """Queue work on the device; return when it will be done. Before its first work it is not idle."""
        start = max(self._host[threading.get_ident()], self._free_at)
        if self.busy:
            self.idle += start - self._free_at
        self.busy += seconds
        self._free_at = start + seconds
        return self._free_at

    def wait(self, until: float) -> None:
        """Let the calling thread wait until work of the device is done."""
        thread = threading.get_ident()
        self._host[thread] = max(self._host[thread], until)

    @property
    def idle_share(self) -> float:
        """Share of the time from its first to its last work in which the device was idle."""
        return self.idle / (self.busy + self.idle)


class Pending:
    """A tensor that the device is still computing."""

    def __init__(self, device, seconds, value) -> None:
        self.device, self.value, self.done = device, value, device.launch(seconds)

    def cpu(self):
        self.device.wait(self.done)
        return self.value
