"""`RequestHandle`: the future of one request, with its record."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import torch

from cat_fast.inference.engine.errors import Cancelled
from cat_fast.inference.engine.request import EngineRequest

Status = Literal["queued", "denoising", "decoding", "finished", "failed", "cancelled"]


@dataclass
class RequestRecord:
    """Accounting of one request."""

    ratio: int
    tokens: int
    """Tokens of the image; twins of guidance not counted."""
    steps: int
    """Number of steps of the scheduler."""
    flops: int = 0
    """FLOPs of all steps in the transformer, twins counted, padding not counted."""
    planned_ratio: int | None = None
    """The ratio asked for, if load moved the image to a coarser one."""
    steps_done: int = 0
    longest_wait_steps: int = 0
    """Largest number of consecutive steps of the engine that left the request out."""
    predicted_seconds: float | None = None
    """Time to completion predicted at submission, with the load of that moment."""
    load_correction: float = 1.0
    """Factor of `predicted_seconds` by which recent requests took longer than their forecasts."""
    predicted_alone_seconds: float | None = None
    """`predicted_seconds` of an idle engine."""
    seconds_queued: float = 0.0
    seconds_denoising: float = 0.0
    """From the start of its first step to the end of its last."""
    seconds_decoding: float = 0.0
    """From the end of its last step, waiting for the decoder included."""

    deadline_missed: bool = False
    """True if it was complete only after its deadline, which is checked at submission."""

    @property
    def seconds(self) -> float:
        return self.seconds_queued + self.seconds_denoising + self.seconds_decoding


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Estimate of an image after some of its steps."""

    step: int
    image: torch.Tensor
    """(3, H, W) in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class EngineOutput:
    """Result of a request."""

    latent: torch.Tensor
    """(c, h, w) float32, in the transformer's scale."""
    image: torch.Tensor | None
    """(3, H, W) in [-1, 1]; None if the request is not to be decoded."""
    record: RequestRecord


def _running_future() -> "Future[EngineOutput]":
    """Return a future that only the engine ends: a cancelled coroutine that waits for it cannot cancel it."""
    future: Future[EngineOutput] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(eq=False)
class RequestHandle:
    """A submitted request. Methods may be called from any thread."""

    id: int
    request: EngineRequest
    record: RequestRecord
    status: Status = "queued"
    submitted: float = field(default_factory=time.perf_counter)
    on_preview: Callable[[Preview], None] | None = None
    """Called on the engine's decoding thread."""
    _future: "Future[EngineOutput]" = field(default_factory=_running_future)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def result(self, timeout: float | None = None) -> EngineOutput:
        """Wait for the image.

        Raises:
            Cancelled: the request was cancelled.
            TimeoutError: it is not complete after `timeout` seconds.
            Exception: the error of this request; other requests are not affected.
        """
        return self._future.result(timeout)

    async def wait(self) -> EngineOutput:
        """Wait for the image in an event loop; cancelling this coroutine cancels the request."""
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def done(self) -> bool:
        """Return True if the request is finished, failed or cancelled."""
        return self._future.done()

    def cancel(self) -> bool:
        """Ask the engine to drop the request at the next step; return False if it is done already."""
        self._cancelled.set()
        return not self.done()

    @property
    def is_cancelled(self) -> bool:
        """True if `cancel` was called."""
        return self._cancelled.is_set()

    def add_done_callback(self, callback: Callable[["RequestHandle"], None]) -> None:
        """Call `callback` with this handle once it is done, on one of the engine's threads."""
        self._future.add_done_callback(lambda _: callback(self))

    def finish(self, output: EngineOutput) -> None:
        """Complete the request."""
        self._set("finished", lambda: self._future.set_result(output))

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        status: Status = "cancelled" if isinstance(error, Cancelled) else "failed"
        self._set(status, lambda: self._future.set_exception(error))

    def drop(self) -> None:
        """End the request as cancelled."""
        self.fail(Cancelled(self.record.steps_done, self.record.steps))

    def _set(self, status: Status, complete: Callable[[], None]) -> None:
        with self._lock:
            if not self._future.done():
                self.status = status
                complete()
