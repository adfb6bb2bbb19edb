"""Steps of a task without the loop, and a task whose steps are one method."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cat_fast.training.config.settings import RunConfig
from cat_fast.training.health.nan_guard import SKIPPED
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.step import Backward, Stepper, Steps


def train_step(task: Any, step: int) -> dict[str, float]:
    """Collective: do one step of a run's task; return its metrics."""
    return step_metrics(task, task.config, task.ranks, step)


def step_metrics(task: Steps, config: RunConfig, ranks: Ranks, step: int) -> dict[str, float]:
    done = Stepper(task, config, ranks).step(step)
    assert done
    return done.metrics()


class PlainTask:
    """Implements `step.Steps` by `train_step(step)`, which returns the metrics; no data, no engine.

    A step whose metrics hold `SKIPPED` fails the guard.
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
