"""`PackedEngine`: step-level continuous batching of requests over packed sequences.

    engine = PackedEngine(pipeline, max_tokens=4096)
    handles = [engine.submit(EngineRequest(sample=sample)) for sample in pipeline.plan(["sky", "page"])]
    engine.run()
    images = [handle.result().image for handle in handles]

Each step packs as many requests as fit, whatever their ratios, sizes, timesteps, schedulers, guidance and
texts. Bits of an image do not depend on the others in flight. `start` runs the steps on a thread and decoding
on another; `submit` may then be called from any thread, and `await handle.wait()` in an event loop.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, Self

import torch

from cat_fast.errors import UserError
from cat_fast.hardware import is_out_of_memory, release_memory
from cat_fast.inference.engine.admission import Admission, Checked, InFlight, check_room
from cat_fast.inference.engine.cost import CostModel
from cat_fast.inference.engine.decoding import Decoding
from cat_fast.inference.engine.entry import Entry
from cat_fast.inference.engine.errors import DeadlineUnreachable, Draining, QueueFull
from cat_fast.inference.engine.handle import RequestHandle, RequestRecord
from cat_fast.inference.engine.order import CostAware, Order, select
from cat_fast.inference.engine.report import StepReport, StepSummary
from cat_fast.inference.engine.request import EngineRequest
from cat_fast.inference.engine.stages import Models, Stages
from cat_fast.inference.engine.statistics import EngineStatistics

_RECOVER_STEPS = 100
"""Steps after which a row budget that was halved by an out-of-memory error doubles again."""


class PackedEngine:
    """Continuous batching over the stages of a pipeline.

    Args:
        pipeline: a `CATPipeline`, on the device that draws.
        max_tokens: maximum number of tokens per step, with the unconditional twins of guidance.
        order: who goes first; by default short requests, with ageing.
        max_queue: maximum number of unfinished requests, those that wait for the decoder included; None for
            no limit.
        coarser_after: predicted seconds of waiting, times the complexity score, after which requests that
            allow it move to a coarser ratio, simple images first. None never moves them.
        stages: by default those of the pipeline.
        cost: predicts seconds; by default a model that has not been calibrated.
        clock: returns the time in seconds; benchmarks pass a simulated one.
        on_step: called after each step, before finished latents are decoded.
    """

    def __init__(
        self,
        pipeline: Models,
        max_tokens: int,
        *,
        order: Order | None = None,
        max_queue: int | None = None,
        coarser_after: float | None = None,
        stages: Stages | None = None,
        cost: CostModel | None = None,
        clock: Callable[[], float] = time.perf_counter,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        if max_tokens < 1:
            raise UserError(f"max_tokens: expected at least 1, got {max_tokens}")
        self.max_tokens = max_tokens
        self.order: Order = order or CostAware()
        self.max_queue = max_queue
        self.on_step, self.clock = on_step, clock
        self.stages = stages or Stages(pipeline)
        self.cost = cost or CostModel(self.stages)
        self.statistics = EngineStatistics()
        self.last_step: StepSummary | None = None
        self._encoder = pipeline.text_encoder
        self._next_number = 0
        self._entries: list[Entry] = []
        self._changed = threading.Condition()
        self._step = 0
        self._rows_allowed = max_tokens
        self._rows_reduced_at = 0
        self._closing: Literal["drain", "stop"] | None = None
        self._thread: threading.Thread | None = None
        self.admission = Admission(self.cost, self.statistics, self.order, coarser_after)
        self._decoding = Decoding(self.stages, self.cost, self.statistics, clock)

    # submission

    def submit(
        self, request: EngineRequest, *, on_preview: Callable[[Any], None] | None = None
    ) -> RequestHandle:
        """Queue a request; it joins the next step that has room.

        Raises:
            UserError: the request cannot be drawn by this engine.
            QueueFull, DeadlineUnreachable, Draining: it is not accepted now.
        """
        return self.submit_all([request], on_previews=[on_preview])[0]

    def submit_all(
        self,
        requests: Sequence[EngineRequest],
        *,
        on_previews: Sequence[Callable[[Any], None] | None] | None = None,
    ) -> list[RequestHandle]:
        """Queue all requests or none; see `submit`.

        Args:
            on_previews: receiver of the previews of each request.

        Raises:
            UserError: one of them cannot be drawn by this engine, or there are more than the queue can hold.
            QueueFull, DeadlineUnreachable, Draining: they are not accepted now.
        """
        self.check_number(len(requests))
        callbacks = on_previews or [None] * len(requests)
        checked = [self._check(request) for request in requests]
        with self._changed:
            try:
                entries = self._admit(checked, callbacks)
            except (QueueFull, DeadlineUnreachable, Draining) as refusal:
                self.statistics.refused(refusal.reason, len(requests))
                raise
            self._next_number += len(entries)
            if self._entries and entries:
                self._entries[0].alone = False  # the others are not alone already
            self._entries += entries
            self.statistics.submitted += len(entries)
            self._changed.notify_all()
        return [entry.handle for entry in entries]

    def check_number(self, requests: int) -> None:
        """Raise UserError if this many requests can never be in the queue together."""
        if self.max_queue is not None and requests > self.max_queue:
            raise UserError(
                f"{requests} images at once can never fit the queue, which holds {self.max_queue}; ask for at"
                f" most {self.max_queue}"
            )

    async def generate(self, request: EngineRequest) -> Any:
        """Submit a request and wait for its output; cancelling this coroutine cancels the request."""
        return await self.submit(request).wait()

    def predict_seconds(self, request: EngineRequest) -> float:
        """Return the predicted time to completion of a request if it were submitted now."""
        text_tokens = 0 if self._encoder is None else self._encoder.count_tokens([request.sample.text])[0]
        cost = self.cost.cost(request, request.sample, text_tokens)
        with self._changed:
            return self.admission.forecast(request, cost, self._in_flight()).seconds

    @property
    def unfinished(self) -> int:
        """Number of requests that are queued, between steps, or waiting for the decoder."""
        return self.statistics.unfinished

    @property
    def waiting(self) -> int:
        """Number of requests that have not had a step yet."""
        return sum(entry.started is None for entry in list(self._entries))

    # running

    def step(self) -> StepReport | None:
        """Run one step and decode what it finishes; return None if there is nothing to do.

        Only for an engine that is not started.
        """
        report = self._run_step()
        self._decoding.run()
        return report

    def run(self) -> None:
        """Run steps until no request is left."""
        while self.step() is not None:
            pass

    def start(self) -> Self:
        """Run steps on a thread, and decoding on another one, until `close`."""
        if self._thread is not None:
            raise RuntimeError("the engine has been started already")
        executor = ThreadPoolExecutor(1, thread_name_prefix="cat-fast decode")
        self._decoding.use(executor)
        self._thread = threading.Thread(target=self._loop, name="cat-fast denoise", daemon=True)
        self._thread.start()
        return self

    def close(self, *, timeout: float = 0.0) -> list[RequestHandle]:
        """Take no further requests, finish those in flight for up to `timeout` seconds, end the threads.

        Returns:
            The requests that were not finished, except cancelled ones; each has the error `Draining`.
        """
        deadline = time.perf_counter() + timeout
        with self._changed:
            self._closing = "drain"
            self._changed.notify_all()
            while self.unfinished and self._thread is not None:
                left = deadline - time.perf_counter()
                if left <= 0:
                    break
                self._changed.wait(min(left, 0.05))
            self._closing = "stop"
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        unfinished = [entry.handle for entry in self._entries] + self._decoding.stop()
        self._entries.clear()
        lost = [handle for handle in unfinished if not handle.is_cancelled]
        for handle in unfinished:
            if handle.is_cancelled:
                handle.drop()
            else:
                handle.fail(Draining())
        return lost

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(timeout=0.0 if kind else float("inf"))

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._entries and self._closing != "stop":
                    self._changed.wait()
                if self._closing == "stop":
                    return
            try:
                self._run_step()
            except Exception as error:  # of the engine itself: no request may wait forever
                with self._changed:
                    for entry in self._entries:
                        entry.handle.fail(error)
                    self._entries = []

    def _run_step(self) -> StepReport | None:
        begun = self.clock()
        self._drop_cancelled()
        with self._changed:
            if not self._entries:
                return None
            self._step += 1
            if self._step - self._rows_reduced_at >= _RECOVER_STEPS and self._rows_allowed < self.max_tokens:
                self._rows_allowed = min(2 * self._rows_allowed, self.max_tokens)
                self._rows_reduced_at = self._step
            chosen = select(self._entries, self.order, self._rows_allowed, self._step, begun)
            entries = [self._entries[i] for i in chosen]
            left_out = len(self._entries) - len(entries)
        ready = [entry for entry in entries if self._prepare(entry, begun)]
        self._count_waiting(ready)
        rows = sum(entry.rows for entry in ready)
        filled_before = self.stages.filled_rows
        denoising = self.clock()
        predictions = self._denoise(ready)
        denoised = self.clock()
        if len(predictions) == len(ready) > 0:
            self.cost.measured_step(sum(entry.cost.step_flops for entry in ready), denoised - denoising)
        with contextlib.suppress(Exception):  # each scheduler step then draws its own, and fails alone
            self.stages.draw_noise([entry.state for entry in predictions if entry.state is not None])
        for entry in predictions:
            self._isolated(entry, self._advance, predictions[entry])
        report = StepReport(
            number=self._step,
            handles=tuple(entry.handle for entry in predictions),
            states=tuple(entry.state for entry in predictions if entry.state is not None),
            requests=tuple(entry.place for entry in predictions),
            left_out=left_out,
            rows=rows,
            filled_rows=max(rows, self.stages.filled_rows - filled_before),
            max_rows=self.max_tokens,
            seconds=self.clock() - begun,
        )
        self.last_step = report.summary
        if self.on_step is not None:
            self.on_step(report)
        for entry in predictions:
            if entry.state is not None and entry.state.finished and not entry.handle.done():
                self._isolated(entry, self._finish_denoising)
        with self._changed:
            self._entries = [entry for entry in self._entries if not entry.has_left]
            self._changed.notify_all()
        self.statistics.step(report, denoised - denoising, self.clock() - begun)
        return report

    def _count_waiting(self, ready: Sequence[Entry]) -> None:
        """Update how long requests have waited for a step, given those that share the current one."""
        for entry in ready:
            record = entry.handle.record
            record.longest_wait_steps = max(record.longest_wait_steps, self._step - entry.last_step - 1)
            entry.last_step = self._step
        for entry in self._entries:
            record = entry.handle.record
            record.longest_wait_steps = max(record.longest_wait_steps, self._step - entry.last_step)

    def _prepare(self, entry: Entry, now: float) -> bool:
        """Prepare a request before its first step; return False if that failed."""
        if entry.state is not None:
            return True

        def first(entry: Entry) -> None:
            entry.state = self.stages.prepare(entry.request)
            entry.started = now
            entry.handle.status = "denoising"
            entry.handle.record.seconds_queued = now - entry.arrived

        return self._isolated(entry, first)

    def _denoise(self, entries: Sequence[Entry]) -> "dict[Entry, torch.Tensor]":
        """Return the predictions of requests; failures are narrowed down by halving the batch.

        A request that fails by itself gets the error. Out of memory, smaller batches follow.
        """
        if not entries:
            return {}
        try:
            states = [entry.state for entry in entries if entry.state is not None]
            return dict(zip(entries, self.stages.denoise_step(states), strict=True))
        except Exception as error:
            memory = is_out_of_memory(error)
            if memory:
                self.statistics.out_of_memory += 1
                half_rows = sum(entry.rows for entry in entries) // 2
                self._rows_allowed = max(min(self._rows_allowed, half_rows), 1)
                self._rows_reduced_at = self._step
            if len(entries) == 1:
                entries[0].handle.fail(_explained(error, entries[0].rows) if memory else error)
                return {}
        if memory:
            release_memory()
        half = len(entries) // 2
        return self._denoise(entries[:half]) | self._denoise(entries[half:])

    def _advance(self, entry: Entry, prediction: torch.Tensor) -> None:
        request, record, state = entry.handle.request, entry.handle.record, entry.state
        assert state is not None
        every = request.preview_every
        preview = every and (record.steps_done + 1) % every == 0 and record.steps_done + 1 < record.steps
        if preview and entry.handle.on_preview is not None:
            clean = state.solver.clean_estimate(prediction, state.tokens)
            self._decoding.preview(
                entry.handle, state.latent(self.stages.patch_size, clean), entry.request.sample
            )
        self.stages.scheduler_step(state, prediction)
        record.steps_done += 1

    def _finish_denoising(self, entry: Entry) -> None:
        assert entry.state is not None
        assert entry.started is not None
        handle = entry.handle
        handle.record.seconds_denoising = self.clock() - entry.started
        latent = self.stages.latent(entry.state)
        handle.status = "decoding"
        self._decoding.add(handle, latent, entry.request.sample, alone=entry.alone)

    def _isolated(self, entry: Entry, function: Callable[..., None], *arguments: Any) -> bool:
        """Run a stage of one request; its error ends this request only."""
        try:
            function(entry, *arguments)
        except Exception as error:
            entry.handle.fail(error)
            return False
        return True

    def _check(self, request: EngineRequest) -> Checked:
        """Check a request, and compute its costs; needs no lock."""
        self.stages.check(request)
        variants = request.variants
        for variant in variants:
            check_room([variant.sample], [variant.passes], self.max_tokens)
        text_tokens = 0 if self._encoder is None else self._encoder.count_tokens([request.sample.text])[0]
        costs = [self.cost.cost(variant, variant.sample, text_tokens) for variant in variants]
        return Checked(variants, costs)

    def _admit(
        self, checked: Sequence[Checked], on_previews: Sequence[Callable[[Any], None] | None]
    ) -> list[Entry]:
        """Return the entries of requests that are accepted together, in order; under the lock."""
        if self._closing:
            raise Draining
        unfinished, in_flight = self.unfinished, self._in_flight()
        if self.max_queue is not None and unfinished + len(checked) > self.max_queue:
            places = unfinished + len(checked) - self.max_queue
            seconds = self.admission.room_seconds(places, in_flight)
            raise QueueFull(unfinished, self.max_queue, max(1.0, seconds))
        choices = self.admission.choose(checked, in_flight)
        entries: list[Entry] = []
        for one, (chosen, forecast), on_preview in zip(checked, choices, on_previews, strict=True):
            request, drawn, cost = one.request, one.variants[chosen], one.costs[chosen]
            record = RequestRecord(
                ratio=drawn.sample.ratio,
                tokens=drawn.sample.num_tokens,
                steps=request.num_inference_steps,
                flops=cost.flops,
                planned_ratio=request.sample.ratio if chosen else None,
                predicted_seconds=None if forecast is None else forecast.seconds,
                load_correction=1.0 if forecast is None else forecast.correction,
                predicted_alone_seconds=cost.seconds,
            )
            number = self._next_number + len(entries)
            handle = RequestHandle(id=number, request=request, record=record, on_preview=on_preview)
            handle.add_done_callback(self.statistics.ended)
            entries.append(
                Entry(
                    handle=handle,
                    request=drawn,
                    cost=cost,
                    number=number,
                    arrived=self.clock(),
                    last_step=self._step,
                    alone=not unfinished and len(checked) == 1,
                )
            )
        return entries

    def _in_flight(self) -> InFlight:
        return InFlight(
            entries=[entry for entry in self._entries if not entry.has_left],
            max_rows=self._rows_allowed,
            decoding_seconds=self._decoding.backlog_seconds,
            decoded=self._decoding.finish_seconds,
            now=self.clock(),
        )

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [entry for entry in self._entries if entry.handle.is_cancelled or entry.handle.done()]
            self._entries = [entry for entry in self._entries if entry not in dropped]
        for entry in dropped:  # without the lock: callbacks may call the engine, and take other locks
            entry.handle.drop()


def _explained(error: Exception, rows: int) -> UserError:
    made = UserError(
        f"out of memory with a single image of {rows} tokens per step; choose a coarser ratio, a smaller size"
        " or guidance_scale 1"
    )
    made.__cause__ = error
    return made
