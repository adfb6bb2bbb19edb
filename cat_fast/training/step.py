"""One training step of any task: draw batches, run the backward passes, update on all ranks or on none.

    draw        this rank's batches, their images, tokens, seconds
    reduce      amounts of all ranks; a stop requested before, or a draw that failed, ends all ranks here
    backward    forward and backward passes of every accumulation step
    reduce      losses, gradient norms and the sums of metrics; a stop request ends all ranks after the step
    update      weights and averages, or nothing where anything was not finite

Apart from what DeepSpeed exchanges, the two reductions are all that ranks send each other in a step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.training.config.settings import RunConfig
from cat_fast.training.health.nan_guard import SKIPPED, StepGuard
from cat_fast.training.health.stragglers import SlowRanks
from cat_fast.training.metrics.step_means import reduce_step
from cat_fast.training.runtime.collective_errors import raise_shared
from cat_fast.training.runtime.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Backward:
    """Result of a rank's backward passes."""

    losses: Mapping[str, Tensor]
    """For the guard: (P,) values, one per accumulation step, by term."""
    engines: Mapping[str, Any]
    """Engines that hold gradients, by name."""
    sums: Tensor
    """Numbers to sum over ranks, of any shape, on the device."""
    metrics: Callable[[Tensor], dict[str, float]]
    """Metrics of the step from the summed `sums`, on the CPU. Called during the next step: it reads nothing
    that a later step changes."""


class Steps(Protocol):
    """What a task does in a step. Only `backward` and `update` may communicate, through DeepSpeed."""

    @property
    def amounts(self) -> Sequence[str]:
        """Names of the amounts that `draw` returns."""
        ...

    def draw(self, step: int) -> Sequence[float]:
        """Read this rank's batches of a step; return its amounts, which are summed over ranks.

        Reports the batches to `ranks.work.on`.

        Raises:
            UserError: a batch cannot be read. All ranks end then.
        """
        ...

    def undraw(self) -> None:
        """Restore the position in the data from before the last `draw`, for a checkpoint. No step follows."""
        ...

    def backward(self, step: int, totals: Mapping[str, float]) -> Backward:
        """Run the forward and backward passes on what was drawn, given the amounts of all ranks.

        Calls `ranks.work.computed` where it first waits for other ranks.
        """
        ...

    def update(self, backward: Backward, sums: Tensor) -> None:
        """Apply the gradients. Called if losses and gradients are finite on every rank, with the summed
        `backward.sums`, on the CPU."""
        ...


class Request(NamedTuple):
    """What this rank asks of all at a reduction."""

    stop: bool = False
    """End the run, with a checkpoint."""
    error: UserError | None = None
    """End the run with this error."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A step that was done, or skipped."""

    stop: bool
    """A rank was asked to stop during the step."""
    metrics: Callable[[], dict[str, float]]
    """Metrics, equal on all ranks; `nan_guard.SKIPPED` is among them where nothing was updated. Called
    at most once, during the next step; waits for no device."""


class Stepper:
    """Runs the steps of a task on all ranks."""

    def __init__(self, task: Steps, config: RunConfig, ranks: Ranks) -> None:
        self.task, self.ranks = task, ranks
        self.guard = StepGuard(config.guard, ranks)
        self.slow_ranks = SlowRanks(config.slow_ranks, ranks)

    def step(
        self, step: int, before: Request | None = None, during: Callable[[], Request] = Request
    ) -> Done | None:
        """Collective: do one step.

        Args:
            before: what this rank asks since the step before.
            during: called while a device runs the backward passes; returns what this rank asks by then.

        Returns:
            None if a rank asked to stop before the step: then nothing was done, and the data is where it was.

        Raises:
            SharedError: a rank has an error, or too many steps in a row were not finite.
        """
        task, ranks, before = self.task, self.ranks, before or Request()
        ranks.work.begin(step)
        amounts: Sequence[float] = [0.0] * len(task.amounts)
        failed: UserError | None = None
        try:
            amounts = task.draw(step)
        except UserError as error:
            failed = error
        ranks.work.computed()
        drawn = torch.tensor([*amounts, failed is not None], dtype=torch.float64)
        stop, (totals,) = reduce_step(ranks, drawn, stop=before.stop, error=before.error)
        if stop:
            task.undraw()
            return None
        if totals[-1]:
            raise_shared(failed, ranks)
        ranks.work.resumed()
        backward = task.backward(step, dict(zip(task.amounts, totals.tolist(), strict=False)))
        ranks.work.computed()

        verdict = self.guard.inspect(backward.losses, backward.engines)
        asked = during()
        stop, (verdict, sums, own_times) = reduce_step(
            ranks, verdict, backward.sums, self.slow_ranks.own_time(), stop=asked.stop, error=asked.error
        )
        passed = self.guard.passes(verdict.tolist())
        if passed:
            task.update(backward, sums)
        of = backward.metrics  # alone: the rest of it holds on to memory of the device
        return Done(stop=stop, metrics=lambda: self._metrics(of(sums), own_times, passed))

    def _metrics(self, metrics: dict[str, float], own_times: Tensor, passed: bool) -> dict[str, float]:
        skipped = {} if passed else {SKIPPED: 1.0}
        return metrics | skipped | self.slow_ranks.compare(own_times)
