"""Helpers to run steps of a task without the loop, and a base class for minimal tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cat_fast.training.config.settings import RunConfig
from cat_fast.training.health.nan_guard import SKIPPED
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.step import Backward, Stepper, Steps


def train_step(task: Any, step: int) -> dict[str, float]:
    """Run one step of a run's task and return its metrics. Collective: every rank must call it."""
    return step_metrics(task, task.config, task.ranks, step)


def step_metrics(task: Steps, config: RunConfig, ranks: Ranks, step: int) -> dict[str, float]:
    result = Stepper(task, config, ranks).step(step)
    assert result
    return result.metrics()


class PlainTask:
    """Implementation of `step.Steps` by `train_step(step)`, which returns the metrics; no data, no engine.

    A step with `SKIPPED` in its metrics fails the guard.
    """

    amounts = ()

    def train_step(self, step: int) -> dict[str, float]:
        raise NotImplementedError

    def draw(self, step: int) -> Sequence[float]:
        return ()

    def undraw(self) -> None: ...

    def backward(self, step: int, totals: Mapping[str, float]) -> Backward:
        metrics = self.train_step(step)
        loss = torch.tensor(float("nan") if SKIPPED in metrics else 1.0)
        return Backward(
            losses={"loss": loss}, engines={}, sums=torch.zeros(0), metrics=lambda sums: dict(metrics)
        )

    def update(self, backward: Backward, sums: torch.Tensor) -> None: ...
