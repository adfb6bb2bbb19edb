"""Totals of an engine since its start."""

import threading
from collections import Counter, deque
from statistics import median

from cat_fast.inference.engine.handle import RequestHandle, RequestRecord
from cat_fast.inference.engine.report import StepReport

_WINDOW = 200
"""Number of requests over which errors of predictions are taken."""


class EngineStatistics:
    """Counters; submitted = finished + cancelled + failed + unfinished."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.submitted = self.finished = self.cancelled = self.failed = 0
        self.refusals: Counter[str] = Counter()
        """Number of refused requests by reason."""
        self.steps = 0
        self.rows = 0
        """Tokens of all steps, twins counted, padding not counted."""
        self.filled_rows = 0
        """Tokens of all forward passes, padding counted."""
        self.max_rows = 0
        """Sum of the row budgets of all steps, each at least its padded tokens."""
        self._waiting_rows = self._waiting_max_rows = 0
        self.tokens_finished = 0
        self.deadlines_missed = 0
        """Number of finished requests that took longer than their deadline: later ones went first."""
        self.seconds_denoising = 0.0
        """In the transformer."""
        self.seconds_steps = 0.0
        """Of complete steps; the difference is the engine's overhead."""
        self.seconds_decoding = 0.0
        self.out_of_memory = 0
        self._errors: dict[bool, deque[float]] = {True: deque(maxlen=_WINDOW), False: deque(maxlen=_WINDOW)}
        self._slowdowns: deque[float] = deque(maxlen=_WINDOW)

    @property
    def unfinished(self) -> int:
        """Number of requests that are queued, between steps, or waiting for the decoder."""
        with self._lock:
            return self.submitted - self.finished - self.cancelled - self.failed

    @property
    def fill(self) -> float:
        """Rows divided by the row budget, over all steps."""
        return self.rows / self.max_rows if self.max_rows else 0.0

    @property
    def padding(self) -> float:
        """Share of padding in the tokens of all forward passes."""
        return 1 - self.rows / self.filled_rows if self.filled_rows else 0.0

    @property
    def fill_waiting(self) -> float:
        """Rows divided by the row budget, over the steps that left a request out."""
        return self._waiting_rows / self._waiting_max_rows if self._waiting_max_rows else 0.0

    @property
    def overhead(self) -> float:
        """Share of step time outside the transformer."""
        return 1 - self.seconds_denoising / self.seconds_steps if self.seconds_steps else 0.0

    @property
    def load_correction(self) -> float:
        """Median of actual over forecast time of recent requests that shared the engine."""
        with self._lock:
            return median(self._slowdowns) if len(self._slowdowns) >= 5 else 1.0

    def median_error(self, *, alone: bool) -> float | None:
        """Return the median relative error of predicted seconds over the last requests; None without any."""
        with self._lock:
            return median(self._errors[alone]) if self._errors[alone] else None

    def refused(self, reason: str, count: int) -> None:
        """Count refused requests."""
        with self._lock:
            self.refusals[reason] += count

    def ended(self, handle: RequestHandle) -> None:
        """Count a request that is done."""
        with self._lock:
            if handle.status == "finished":
                self.finished += 1
                self.tokens_finished += handle.record.tokens
                self.deadlines_missed += handle.record.deadline_missed
            elif handle.status == "failed":
                self.failed += 1
            else:
                self.cancelled += 1

    def step(self, report: StepReport, in_transformer: float, seconds: float) -> None:
        """Count a step."""
        self.steps += 1
        self.rows += report.rows
        max_rows = max(report.max_rows, report.filled_rows)
        self.filled_rows += report.filled_rows
        self.max_rows += max_rows
        if report.left_out:
            self._waiting_rows += report.rows
            self._waiting_max_rows += max_rows
        self.seconds_denoising += in_transformer
        self.seconds_steps += seconds

    def predicted(self, record: RequestRecord, *, alone: bool) -> None:
        """Compare the predicted time of a finished request with its time."""
        predicted = record.predicted_seconds
        if not predicted or record.seconds <= 0:
            return
        with self._lock:
            self._errors[alone].append(abs(predicted - record.seconds) / record.seconds)
            if not alone:
                self._slowdowns.append(record.seconds * record.load_correction / predicted)
