"""Steps of the sampling engine on cat_xl in bf16: with and without CUDA graphs, and the noise of a step."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.body import Context
from benchmarks.gpu.timing import alternate, quartiles
from benchmarks.gpu.workloads import GRIDS, dit
from cat_fast.generator import SampleRequest, make_schedule
from cat_fast.generator.captured_step import CapturedStep
from cat_fast.generator.sampling import (
    Forward,
    SamplingState,
    denoise_step,
    draw_noise,
    prepare,
    scheduler_step,
)
from cat_fast.generator.solvers import set_steps
from cat_fast.generator.step_pack import Filling

LENGTHS = (1024, 256, 256, 64, 64, 64, 64)
"""Tokens of the images of a step, about as many at 8x, 16x and 32x as the paper's mix; each has a twin."""
SOLVER_STEPS = 1000
FILLING = Filling(16, buckets=True)


class EngineStep:
    """A step of all images: prediction, noise and DDPM."""

    def __init__(self, context: Context, device: torch.device) -> None:
        self.model = dit(device, large=not context.dry).to(torch.bfloat16).eval()
        scheduler = set_steps(make_schedule(), "ddpm", SOLVER_STEPS)
        self.images = [
            prepare(self.model, self._request(i, length), scheduler, guidance=3.0)
            for i, length in enumerate((16, 4) if context.dry else LENGTHS)
        ]

    def _request(self, seed: int, length: int) -> SampleRequest:
        return SampleRequest(label=0, ratio=(8, 16, 32)[seed % 3], grid=GRIDS[length], seed=seed)

    def predict(self, forward: Forward | None) -> list[torch.Tensor]:
        """Return the predictions of all images."""
        return denoise_step(self.model, self.images, filling=FILLING, forward=forward)

    def __call__(self, forward: Forward | None) -> None:
        predictions = self.predict(forward)
        draw_noise(self.images)
        for state, prediction in zip(self.images, predictions, strict=True):
            scheduler_step(state, prediction)
            _rewind(state)


def _rewind(state: SamplingState) -> None:
    """Let the next step be the first one again."""
    state.solver.step = 0


def sampling_steps(context: Context, device: torch.device) -> None:
    """Record milliseconds and launches of a step, and whether the captured one has the eager one's bits."""
    step = EngineStep(context, device)
    seconds = 1.0 if context.dry else 4.0
    contestants = {"sampling_step_eager": lambda: step(None)}
    captured = CapturedStep(step.model)
    if device.type == "cuda":
        expected = step.predict(None)
        got = [step.predict(captured) for _ in range(3)][-1]
        if captured.report.failure is None:
            same = all(map(torch.equal, got, expected))
            context.record.figure("sampling_step_captured.same_bits", float(same), "1 if equal")
            contestants["sampling_step_captured"] = lambda: step(captured)
    if "sampling_step_captured" not in contestants:
        reason = captured.report.failure or "a dry run has no GPU"
        for what in ("milliseconds", "launches", "same_bits"):
            context.record.skipped(f"sampling_step_captured.{what}", reason)
    contestants["sampling_noise"] = lambda: draw_noise(step.images)
    turns = {name: [function] for name, function in contestants.items()}
    times = alternate(turns, seconds, device, queue=False)  # a step includes its launches
    for name, found in times.items():
        milliseconds = 1e3 * quartiles([each.seconds for each in found])[1]
        context.record.figure(f"{name}.milliseconds", milliseconds, "ms", images=len(step.images))
        if name != "sampling_noise":
            context.record.figure(f"{name}.launches", _launches(contestants[name], device), "per step")


def _launches(function: Callable[[], None], device: torch.device) -> int:
    """Return the number of launches by the host; a replayed graph is one."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return count_launches(profiler)


def count_launches(profiler: profile) -> int:
    """Return the number of launches that a profile holds."""
    names = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")
    return sum(event.count for event in profiler.key_averages() if event.key.startswith(names))
