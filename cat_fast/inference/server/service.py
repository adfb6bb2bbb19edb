"""`Service`: a pipeline, its engine, and whether they are ready."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cat_fast.complexity import Description
from cat_fast.complexity.captioners.base import Captioner
from cat_fast.errors import UserError, one_line
from cat_fast.inference.engine.engine import PackedEngine
from cat_fast.inference.engine.errors import Draining
from cat_fast.inference.engine.handle import RequestHandle, RequestRecord
from cat_fast.inference.engine.invariance import Invariance, probes, self_test
from cat_fast.inference.engine.request import EngineRequest
from cat_fast.inference.pipeline.cat_pipeline import CATPipeline
from cat_fast.inference.server.describing import UploadDescriber
from cat_fast.inference.server.errors import ApiError, as_api_error
from cat_fast.inference.server.settings import MAX_RECONSTRUCTIONS, ServerSettings
from cat_fast.kernels.linear.op import selected

_CALIBRATION_ROWS = 1024
"""Largest step of the calibration; longer ones are extrapolated."""


class Service:
    """Everything behind the routes.

    Args:
        pipeline: on its device.
        settings: row budget and queue of the engine.
        captioner: adds missing captions and flags to the descriptions of uploaded images; None for none.
    """

    def __init__(
        self, pipeline: CATPipeline, settings: ServerSettings, captioner: Captioner | None = None
    ) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.describer = UploadDescriber(captioner, lambda: self.draining)
        self.engine = PackedEngine(
            pipeline,
            settings.max_tokens,
            max_queue=settings.max_queue,
            coarser_after=settings.coarser_after,
        )
        smallest = min(self.tokens_of(ratio) for ratio in pipeline.transformer.config.ratios)
        if settings.max_tokens < 2 * smallest:
            raise UserError(
                f"--max-tokens {settings.max_tokens} is too small: an image at {pipeline.resolution} px needs"
                f" {2 * smallest}, with the unconditional copy for guidance"
            )
        self.invariance: Invariance | None = None
        """Result of the self-test."""
        self.decode_tier: str | None = None
        """Tier in which the decoder runs, once it is compiled and tested."""
        self.failure: str | None = None
        """Why the server will not become ready."""
        self.draining = False
        self.reconstructing = 0
        """Number of uploads that are being reconstructed."""
        self._uploads = threading.Condition()
        """Held while `reconstructing` changes; notified when an upload ends."""
        self.on_image: Callable[[RequestRecord], None] | None = None
        """Called with the record of every finished image."""
        self.refusals: Counter[str] = Counter()
        """Number of requests for images that were not accepted, by the code of the error."""
        self.lost: list[RequestHandle] = []
        """Requests that the drain did not finish."""
        self.ready_after: float | None = None
        """Seconds that compiling, self-test and calibration took."""

    @property
    def ready(self) -> bool:
        return self.ready_after is not None and not self.draining

    @property
    def default_scheduler(self) -> str:
        """Solver of requests that name none: 30 steps suffice for it."""
        return "euler" if "FlowMatch" in type(self.pipeline.scheduler).__name__ else "ddim"

    def tokens_of(self, ratio: int, size: tuple[int, int] | None = None) -> int:
        """Return the number of tokens of an image of (width, height) at a ratio."""
        width, height = size or (self.pipeline.resolution,) * 2
        unit = ratio * self.pipeline.transformer.config.patch_size
        return (width // unit) * (height // unit)

    def prepare(self) -> None:
        """Compile the decoder, run the self-test, calibrate, and start the engine.

        On an error, set `failure`.
        """
        begun = time.perf_counter()
        try:
            with self.engine.stages.vae_lock:  # reconstructions are served meanwhile
                self.decode_tier = self.pipeline.use_decode_tier(self.settings.decode_tier)
            self.invariance = self_test(self.engine.stages, self.settings.max_tokens)
            self.engine.cost.calibrate(self._calibration_packs())
            self.engine.start()
        except Exception as error:
            self.failure = one_line(error)
            return
        self.ready_after = time.perf_counter() - begun

    def drain(self) -> None:
        """Take no further requests; finish images and uploads in flight, for at most the drain limit."""
        end = time.monotonic() + self.settings.drain_seconds
        self.draining = True
        self.lost = self.engine.close(timeout=self.settings.drain_seconds)
        with self._uploads:
            left = min(end - time.monotonic(), threading.TIMEOUT_MAX)
            self._uploads.wait_for(lambda: self.reconstructing == 0, max(left, 0.0))

    def require_accepting(self) -> None:
        """Raise ApiError, 503, while no images are drawn."""
        self.require_not_draining()
        if not self.ready:
            reason = self.failure or (
                "the server is starting: calibration and self-test take seconds, compiling for --tier fast"
                " takes minutes"
            )
            raise ApiError(503, reason, code="not_ready", headers={"Retry-After": "5"})

    def require_not_draining(self) -> None:
        """Raise ApiError, 503, after the signal to stop."""
        if self.draining:
            raise as_api_error(Draining())

    @contextmanager
    def reconstruction(self) -> Iterator[None]:
        """Count one upload more while it is reconstructed; `drain` waits for it.

        Uploads hold memory, and threads that images need too.

        Raises:
            ApiError: 503 after the signal to stop; 429 if as many as allowed are being reconstructed.
        """
        with self._uploads:
            self.require_not_draining()
            if self.reconstructing >= MAX_RECONSTRUCTIONS:
                raise ApiError(
                    429,
                    f"{self.reconstructing} images are being reconstructed, the limit; retry in 1 s",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            self.reconstructing += 1
        try:
            yield
        finally:
            with self._uploads:
                self.reconstructing -= 1
                self._uploads.notify_all()

    def readiness(self) -> dict[str, Any]:
        """Return the state for /readyz."""
        invariance, captured = self.invariance, self.engine.stages.captured
        return {
            "ready": self.ready,
            "state": "draining"
            if self.draining
            else "failed"
            if self.failure
            else "ready"
            if self.ready
            else "starting",
            "reason": self.failure,
            "model": self.settings.name,
            "device": str(self.engine.stages.device),
            "linear_backend": selected() if self.engine.stages.device.type == "cpu" else None,
            "decode_tier": self.decode_tier,
            "bits_independent_of_neighbours": None if invariance is None else invariance.independent,
            "cuda_graphs": None if captured is None else captured.report.to_json(),
            "self_test": None if invariance is None else invariance.to_json(),
            "ready_after_seconds": self.ready_after,
            "flops_per_second": self.engine.cost.flops_per_second if self.engine.cost.calibrated else None,
        }

    def refused(self, code: str) -> None:
        """Count a request for images that was not accepted; for the event loop only."""
        self.refusals[code] += 1

    def ended(self, handle: RequestHandle) -> None:
        """Pass on the record of a finished image."""
        if self.on_image is not None and handle.status == "finished":
            self.on_image(handle.record)

    def describe(self) -> dict[str, Any]:
        """Return facts about the pipeline that the page needs."""
        pipeline = self.pipeline
        ratios = sorted(pipeline.transformer.config.ratios)
        return {
            "model": self.settings.name,
            "resolution": pipeline.resolution,
            "ratios": ratios,
            "tokens": {str(ratio): self.tokens_of(ratio) for ratio in ratios},
            "fixed_16x_tokens": self.tokens_of(16),
            "takes_text": pipeline.text_encoder is not None,
            "labels": pipeline.labels[:1000],
            "max_tokens": self.settings.max_tokens,
            "needs_token": self.settings.token is not None,
            "captioner": self.describer.captioner,
        }

    def description_of(self, prompt: str) -> Description:
        """Return the description that a prompt is scored by."""
        labels = self.pipeline.labels
        if prompt in labels:
            return self.pipeline.descriptions[labels.index(prompt)]
        return Description(prompt)

    def _calibration_packs(self) -> list[list[EngineRequest]]:
        samples = sorted(probes(self.engine.stages), key=lambda one: one.num_tokens)
        samples = [one for one in samples if one.num_tokens <= self.settings.max_tokens]
        packs = []
        for limit in (0, 128, 384, min(self.settings.max_tokens, _CALIBRATION_ROWS)):
            pack, rows, i = [samples[0]], samples[0].num_tokens, 1
            while limit and rows + samples[i % len(samples)].num_tokens <= limit:
                rows += samples[i % len(samples)].num_tokens
                pack.append(samples[i % len(samples)])
                i += 1
            packs.append([EngineRequest(sample=one, guidance_scale=1.0) for one in pack])
        return packs


def prepare_in_background(service: Service, on_failure: Callable[[], None]) -> threading.Thread:
    """Run `Service.prepare` on a thread of its own; call `on_failure` once `failure` is set."""

    def prepare() -> None:
        with torch.no_grad():
            service.prepare()
        if service.failure is not None:
            on_failure()

    thread = threading.Thread(target=prepare, name="cat-fast prepare", daemon=True)
    thread.start()
    return thread
