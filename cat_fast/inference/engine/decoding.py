"""Decoding of finished latents and previews, batched by ratio and shape, next to the denoising thread."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import accumulate

import torch

from cat_fast.errors import UserError
from cat_fast.generator.sampling import SampleRequest
from cat_fast.hardware import is_out_of_memory, release_memory
from cat_fast.inference.engine.cost import CostModel
from cat_fast.inference.engine.handle import EngineOutput, Preview, RequestHandle
from cat_fast.inference.engine.stages import Stages
from cat_fast.inference.engine.statistics import EngineStatistics


@dataclass(eq=False)
class _Item:
    handle: RequestHandle
    latent: torch.Tensor
    sample: SampleRequest
    alone: bool
    queued: float
    preview_step: int | None = None

    @property
    def kind(self) -> tuple[int, torch.Size]:
        return self.sample.ratio, self.latent.shape


class Decoding:
    """Queue of latents; finished images go before previews."""

    def __init__(
        self, stages: Stages, cost: CostModel, statistics: EngineStatistics, clock: Callable[[], float]
    ) -> None:
        self._stages, self._cost, self._statistics = stages, cost, statistics
        self._clock = clock
        self._finished: deque[_Item] = deque()
        self._previews: dict[RequestHandle, _Item] = {}
        self._in_progress: list[_Item] = []
        self._lock = threading.Lock()
        self._executor: Executor | None = None
        self._stopped = False

    def use(self, executor: Executor) -> None:
        """Decode on an executor of one thread instead of in `run`."""
        self._executor = executor

    @property
    def backlog_seconds(self) -> float:
        """Predicted seconds until the decoder is idle."""
        return sum(self._cost.decode_seconds(item.sample) for item in self._items())

    @property
    def finish_seconds(self) -> list[float]:
        """Predicted seconds until each image is decoded, previews excluded; ascending."""
        items = self._items()
        ends = accumulate(self._cost.decode_seconds(item.sample) for item in items)
        return [end for item, end in zip(items, ends, strict=True) if item.preview_step is None]

    def add(self, handle: RequestHandle, latent: torch.Tensor, sample: SampleRequest, *, alone: bool) -> None:
        """Queue a finished latent."""
        item = _Item(handle, latent, sample, alone, self._clock())
        if not handle.request.decode:
            self._complete(item, None)
            return
        with self._lock:
            self._finished.append(item)
        self._kick()

    def preview(self, handle: RequestHandle, latent: torch.Tensor, sample: SampleRequest) -> None:
        """Queue a preview; it replaces an earlier one of the same request that is still waiting."""
        item = _Item(handle, latent, sample, False, self._clock(), handle.record.steps_done + 1)
        with self._lock:
            self._previews[handle] = item
        self._kick()

    def run(self) -> None:
        """Decode everything that is queued."""
        while batch := self._take():
            self._decode(batch)
            with self._lock:
                self._in_progress = []

    def stop(self) -> list[RequestHandle]:
        """End the thread after the batch in progress; return the requests that are not decoded."""
        self._stopped = True
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        lost = [item.handle for item in self._finished]
        self._finished.clear()
        self._previews.clear()
        return lost

    def _items(self) -> list[_Item]:
        """Return the items being decoded, then the finished images that wait."""
        with self._lock:
            return [*self._in_progress, *self._finished]

    def _kick(self) -> None:
        if self._executor is not None:
            self._executor.submit(self.run)

    def _take(self) -> list[_Item]:
        with self._lock:
            if self._stopped:
                return []
            cancelled = [item for item in self._finished if item.handle.is_cancelled]
            for item in cancelled:
                self._finished.remove(item)
            for handle in [one for one in self._previews if one.is_cancelled or one.done()]:
                del self._previews[handle]
            if self._finished:
                kind = self._finished[0].kind
                alike = [item for item in self._finished if item.kind == kind]
                batch = alike[: self._stages.decode_batch_of(*kind)]
                for item in batch:
                    self._finished.remove(item)
            elif self._previews:
                handle = next(iter(self._previews))
                batch = [self._previews.pop(handle)]
            else:
                batch = []
            self._in_progress = batch
        for item in cancelled:  # without the lock: callbacks may call the engine
            item.handle.drop()
        return batch

    def _decode(self, batch: list[_Item]) -> None:
        """Decode a batch; failures are narrowed down by halving it."""
        start = self._stages.decoding_seconds
        try:
            images = self._stages.decode([item.latent for item in batch], batch[0].sample.ratio)
        except Exception as error:
            memory = is_out_of_memory(error)
            if len(batch) == 1:
                if batch[0].preview_step is None:
                    batch[0].handle.fail(_explained(error, batch[0]) if memory else error)
                return
            images = None
        if images is None:  # not in the handler, whose error holds the tensors of the failed call
            if memory:
                release_memory()
            half = len(batch) // 2
            self._decode(batch[:half])
            self._decode(batch[half:])
            return
        seconds = (self._stages.decoding_seconds - start) / len(batch)
        self._statistics.seconds_decoding += seconds * len(batch)
        for item, image in zip(batch, images, strict=True):
            self._cost.measured_decoding(item.sample.ratio, item.sample.grid, seconds)
            if item.preview_step is None:
                self._complete(item, image)
            elif item.handle.on_preview is not None and not item.handle.done():
                try:
                    item.handle.on_preview(Preview(step=item.preview_step, image=image))
                except Exception:  # its receiver is gone; the image is not affected
                    item.handle.on_preview = None

    def _complete(self, item: _Item, image: torch.Tensor | None) -> None:
        record, deadline = item.handle.record, item.handle.request.deadline
        record.seconds_decoding = self._clock() - item.queued
        record.deadline_missed = deadline is not None and record.seconds > deadline
        self._statistics.predicted(record, alone=item.alone)
        item.handle.finish(EngineOutput(latent=item.latent, image=image, record=record))


def _explained(error: Exception, item: _Item) -> UserError:
    height, width = (side * item.sample.ratio for side in item.latent.shape[1:])
    made = UserError(
        f"out of memory while decoding a single image of {width} x {height} pixels; choose a smaller size"
    )
    made.__cause__ = error
    return made
