"""Stages that take simulated time and compute nothing: a queue model of faster hardware."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.schedules.clock import Clock
from cat_fast.generator.flops import forward_flops
from cat_fast.inference.engine.request import EngineRequest
from cat_fast.inference.engine.stages import Stages


class SimulatedStages(Stages):
    """A step takes max(its FLOPs, those of a full step) / rate.

    Args:
        pipeline: gives the FLOPs.
        clock: advanced by every step.
        flops_per_second: rate of full steps.
        full_step: FLOPs below which a step takes no less time.
    """

    def __init__(self, pipeline: Any, clock: Clock, flops_per_second: float, full_step: float) -> None:
        super().__init__(pipeline)
        self._clock, self._rate, self._full = clock, flops_per_second, full_step
        self._flops = forward_flops(pipeline.transformer)

    def prepare(self, request: EngineRequest) -> Any:
        solver = SimpleNamespace(step=0, num_steps=request.num_inference_steps)
        return SimpleNamespace(
            request=request.sample,
            passes=request.passes,
            solver=solver,
            tokens=torch.zeros(1),
            finished=False,
        )

    def denoise_step(self, states: Sequence[Any]) -> list[torch.Tensor]:
        flops = sum(state.passes * self._flops.of(state.request.num_tokens) for state in states)
        self._clock.advance(max(flops, self._full) / self._rate)
        return [state.tokens for state in states]

    def draw_noise(self, states: Sequence[Any]) -> None:
        """Draw nothing: these states have no noise."""

    def scheduler_step(self, state: Any, prediction: torch.Tensor) -> None:
        state.solver.step += 1
        state.finished = state.solver.step >= state.solver.num_steps

    def latent(self, state: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
        return torch.zeros(1)

    def decode(self, latents: Sequence[torch.Tensor], ratio: int) -> list[torch.Tensor]:
        return [torch.zeros(3, 1, 1) for _ in latents]
