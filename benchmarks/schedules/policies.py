"""Schedulers of step batching that the engine is compared with; they never pad."""

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from cat_fast.inference.engine.request import EngineRequest


@dataclass(eq=False)
class Job:
    """One request of a run."""

    request: EngineRequest
    arrived: float
    state: Any = None
    steps_done: int = 0
    finished: float | None = None
    last_step: int = 0
    longest_wait: int = 0

    @property
    def rows(self) -> int:
        return self.request.passes * self.request.sample.num_tokens

    @property
    def kind(self) -> tuple[int, float]:
        """Ratio and guidance, which batches of one shape share."""
        return self.request.sample.ratio, self.request.guidance_scale


class Policy(Protocol):
    """Chooses the jobs of the next step."""

    max_rows: int

    def arrive(self, job: Job) -> None: ...

    def choose(self, now: float) -> list[Job]:
        """Return the jobs of the next step, at most `max_rows` rows; empty to wait."""
        ...

    def wake(self, now: float) -> float | None:
        """Return the time at which `choose` may answer otherwise without an arrival; None if never."""
        ...


class DynamicBatching:
    """(a) Batches of equal ratio, steps and guidance that run to the end.

    A batch starts once it is full or its first request has waited for `wait` seconds.
    """

    def __init__(self, max_rows: int, wait: float) -> None:
        self.max_rows, self.wait = max_rows, wait
        self._queue: list[Job] = []
        self._running: list[Job] = []

    def arrive(self, job: Job) -> None:
        self._queue.append(job)

    def choose(self, now: float) -> list[Job]:
        self._running = [job for job in self._running if job.finished is None]
        if self._running or not self._queue:
            return self._running
        seen = set()
        for head in self._queue:  # oldest first
            kind = (*head.kind, head.request.num_inference_steps)
            if kind in seen:
                continue
            seen.add(kind)
            alike = [job for job in self._queue if (*job.kind, job.request.num_inference_steps) == kind]
            batch = alike[: max(1, self.max_rows // head.rows)]
            is_full = (len(batch) + 1) * head.rows > self.max_rows
            if is_full or now >= head.arrived + self.wait:
                self._queue = [job for job in self._queue if job not in batch]
                self._running = batch
                break
        return self._running

    def wake(self, now: float) -> float | None:
        return min((job.arrived + self.wait for job in self._queue), default=None)


class FifoStepBatching:
    """(b) Requests of the running ratio and guidance join at step boundaries while they head the queue."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []

    def arrive(self, job: Job) -> None:
        self._queue.append(job)

    def choose(self, now: float) -> list[Job]:
        self._running = [job for job in self._running if job.finished is None]
        rows = sum(job.rows for job in self._running)
        while self._queue:
            head = self._queue[0]
            fits = (
                rows + head.rows <= self.max_rows and head.kind == self._running[0].kind
                if self._running
                else True
            )
            if not fits:
                break
            self._running.append(self._queue.popleft())
            rows += head.rows
        return self._running

    def wake(self, now: float) -> float | None:
        return None


class DeficitRoundRobin:
    """(c) One queue per ratio and guidance; one step of one queue at a time, the row budget as quantum."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._queues: dict[tuple[int, float], list[Job]] = {}
        self._turns: deque[tuple[int, float]] = deque()
        self._deficit: dict[tuple[int, float], float] = {}

    def arrive(self, job: Job) -> None:
        if job.kind not in self._queues:
            self._queues[job.kind] = []
            self._turns.append(job.kind)
            self._deficit[job.kind] = 0.0
        self._queues[job.kind].append(job)

    def choose(self, now: float) -> list[Job]:
        for kind, jobs in self._queues.items():
            self._queues[kind] = [job for job in jobs if job.finished is None]
        for _ in range(len(self._turns)):
            kind = self._turns[0]
            jobs = self._queues[kind]
            if not jobs:
                self._deficit[kind] = 0.0
                self._turns.rotate(-1)
                continue
            if self._deficit[kind] <= 0:
                self._deficit[kind] += self.max_rows
            batch, rows = [jobs[0]], jobs[0].rows
            for job in jobs[1:]:
                if rows + job.rows <= self.max_rows:
                    batch.append(job)
                    rows += job.rows
            self._deficit[kind] -= rows
            if self._deficit[kind] < batch[0].rows:
                self._turns.rotate(-1)
            return batch
        return []

    def wake(self, now: float) -> float | None:
        return None
