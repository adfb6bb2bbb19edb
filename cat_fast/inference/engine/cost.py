"""Cost of requests before work starts: FLOPs, and seconds from a calibrated rate."""

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cat_fast.generator.flops import forward_flops
from cat_fast.generator.sampling import SampleRequest
from cat_fast.inference.engine.request import EngineRequest
from cat_fast.inference.engine.stages import Stages

_ADAPTATION = 0.05
"""Weight of the newest measurement in running means."""
_DEFAULT_FLOPS_PER_SECOND = 5e10
"""Until a step has been measured."""


@dataclass(frozen=True)
class Cost:
    """Exact cost of a request, and its predicted time on an idle engine."""

    step_flops: int
    """FLOPs of one step, the twin of guidance included."""
    flops: int
    """FLOPs of all steps."""
    step_seconds: float
    seconds: float
    """All steps, and decoding."""


class CostModel:
    """FLOPs by counting, seconds by measuring.

    Seconds per step are a piecewise linear function of its FLOPs through measured points, times a running
    mean of measured over predicted.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        model = stages.pipeline.transformer
        self._flops = forward_flops(getattr(model, "_orig_mod", model))
        self._lock = threading.Lock()
        self._points: list[tuple[float, float]] = []
        """(FLOPs, seconds) of measured steps, both ascending."""
        self._calibrated = False
        self._correction = 1.0
        self._decode_seconds: dict[tuple[int, tuple[int, int]], float] = {}

    @property
    def calibrated(self) -> bool:
        """True once steps have been measured by `calibrate`, or a rate is assumed."""
        return self._calibrated

    @property
    def flops_per_second(self) -> float:
        """Rate at the largest measured step."""
        if not self._points:
            return _DEFAULT_FLOPS_PER_SECOND
        flops, seconds = self._points[-1]
        return flops / (seconds * self._correction)

    def step_flops(self, request: EngineRequest, sample: SampleRequest, text_tokens: int) -> int:
        """Return the FLOPs of one step of a request, drawn as `sample`."""
        flops = self._flops.of(sample.num_tokens, text_tokens)
        return flops if request.passes == 1 else flops + self._flops.of(sample.num_tokens, 0)

    def step_seconds(self, flops: float) -> float:
        """Predict the seconds of one step of this many FLOPs."""
        with self._lock:
            return self._curve(flops) * self._correction

    def decode_seconds(self, sample: SampleRequest) -> float:
        """Predict the seconds of decoding an image, from images of the same ratio and the nearest size."""
        with self._lock:
            known = [
                (
                    abs(size[0] * size[1] - sample.num_tokens),
                    seconds * sample.num_tokens / (size[0] * size[1]),
                )
                for (ratio, size), seconds in self._decode_seconds.items()
                if ratio == sample.ratio
            ]
        return min(known)[1] if known else 0.0

    def cost(self, request: EngineRequest, sample: SampleRequest, text_tokens: int) -> Cost:
        """Return the cost of a request, drawn as `sample`, whose text has `text_tokens` tokens."""
        step_flops = self.step_flops(request, sample, text_tokens)
        seconds = self.step_seconds(step_flops)
        decoding = self.decode_seconds(sample) if request.decode else 0.0
        steps = request.num_inference_steps
        return Cost(step_flops, step_flops * steps, seconds, seconds * steps + decoding)

    def measured_step(self, flops: float, seconds: float) -> None:
        """Take in the time of a step of the engine."""
        with self._lock:
            if not self._points:
                self._points.append((flops, seconds))
                return
            ratio = min(max(seconds / self._curve(flops), 0.2), 5.0)
            self._correction += _ADAPTATION * (ratio - self._correction)

    def measured_decoding(self, ratio: int, grid: tuple[int, int], seconds: float) -> None:
        """Take in the time that the decoder took per image."""
        with self._lock:
            known = self._decode_seconds.get((ratio, grid))
            if known is not None:
                seconds = known + 4 * _ADAPTATION * (seconds - known)
            self._decode_seconds[ratio, grid] = seconds

    def assume(self, flops_per_second: float, full_step: float = 0.0) -> None:
        """Predict with a constant rate instead of measured steps; `full_step` FLOPs cost as much as fewer."""
        with self._lock:
            self._points = [(flops, flops / flops_per_second) for flops in (max(full_step, 1.0), 1e18)]
            self._calibrated, self._correction = True, 1.0

    def calibrate(self, packs: Sequence[Sequence[EngineRequest]], *, repeats: int = 3) -> None:
        """Measure steps of the given packs, and the decoder on their ratios.

        Args:
            packs: requests of one step each, from the smallest to the largest step.
            repeats: measurements per pack, of which the median counts.
        """
        points: list[tuple[float, float]] = []
        latents: dict[tuple[int, tuple[int, int]], torch.Tensor] = {}
        for requests in packs:
            states = [self._stages.prepare(request) for request in requests]
            flops = sum(
                self.step_flops(request, request.sample, 0 if state.text is None else len(state.text))
                for request, state in zip(requests, states, strict=True)
            )
            self._stages.denoise_step(states)  # warm-up
            points.append((flops, median_seconds(partial(self._stages.denoise_step, states), repeats)))
            for state in states:
                latents[state.request.ratio, state.request.grid] = state.latent(self._stages.patch_size)
        with self._lock:
            self._points, self._correction = _ascending(points), 1.0
            self._calibrated = True
        for (ratio, grid), latent in latents.items():
            self._stages.decode([latent], ratio)
            decode = partial(self._stages.decode, [latent], ratio)
            seconds = median_seconds(decode, repeats, lambda: self._stages.decoding_seconds)
            self.measured_decoding(ratio, grid, seconds)

    def _curve(self, flops: float) -> float:
        points = self._points
        if len(points) < 2:
            rate = points[0][0] / points[0][1] if points else _DEFAULT_FLOPS_PER_SECOND
            return flops / rate
        i = min(max(bisect_left(points, (flops, 0.0)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[i - 1], points[i]
        if flops < points[0][0]:
            return points[0][1]  # smaller steps are filled up, and have the same overhead
        return max(y0 + (flops - x0) * (y1 - y0) / (x1 - x0), 1e-6)


def _ascending(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points by FLOPs, each number of them once, whose seconds do not decrease."""
    found: list[tuple[float, float]] = []
    for flops, seconds in sorted(points):
        if found and flops == found[-1][0]:
            continue
        found.append((flops, max(seconds, found[-1][1]) if found else seconds))
    return found


def median_seconds(
    function: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the median time of a call on a clock."""
    taken = []
    for _ in range(repeats):
        start = clock()
        function()
        taken.append(clock() - start)
    return sorted(taken)[len(taken) // 2]
