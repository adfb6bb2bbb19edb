"""`HostPace`: keeps the host at most one step ahead of a GPU."""

import torch


class HostPace:
    """Waits until the step before the last one is finished.

    Without it, the host launches dozens of steps before the first is computed: requests join and leave late,
    and the host's clock measures launches instead of steps. One step in the queue keeps the device busy.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Event | None = None

    def step(self) -> None:
        """Note that a step has been launched; nothing on a CPU."""
        if self._device.type != "cuda":
            return
        launched = torch.cuda.Event()
        launched.record(torch.cuda.current_stream(self._device))
        if self._last is not None:
            self._last.synchronize()
        self._last = launched
