"""One training step of any task: draw batches, run the backward passes, update on all ranks or on none.

    draw        this rank's batches; returns their images, tokens, seconds
    reduce      amounts of all ranks; an earlier stop request or a failed draw ends all ranks here
    backward    forward and backward passes of every accumulation step
    reduce      losses, gradient norms and the sums of metrics; a stop request ends all ranks after the step
    update      weights and averages; skipped if anything was not finite

Apart from DeepSpeed's own collectives, the two reductions are the only communication of a step; a task whose
loss compares the samples of all ranks also gathers them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.training.config.settings import RunConfig
from cat_fast.training.health.nan_guard import SKIPPED, StepGuard
from cat_fast.training.health.stragglers import StragglerDetector
from cat_fast.training.metrics.step_means import reduce_step
from cat_fast.training.runtime.collective_errors import raise_shared
from cat_fast.training.runtime.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Backward:
    """Result of a rank's backward passes."""

    losses: Mapping[str, Tensor]
    """For the guard: (A,) values, one per accumulation step, by term."""
    engines: Mapping[str, Any]
    """Engines that hold gradients, by name."""
    sums: Tensor
    """Numbers to sum over ranks, of any shape, on the device."""
    metrics: Callable[[Tensor], dict[str, float]]
    """Compute the metrics of the step from the summed `sums`, on the CPU. Called during the next step, so it
    must not read anything that a later step changes."""


class Steps(Protocol):
    """Interface of a task's steps. Only `backward` and `update` may communicate."""

    @property
    def amounts(self) -> Sequence[str]:
        """Names of the amounts that `draw` returns."""
        ...

    def draw(self, step: int) -> Sequence[float]:
        """Read this rank's batches of a step; return its amounts, which are summed over ranks.

        Passes the descriptions of the batches to `ranks.step_context.set_batches`.

        Raises:
            UserError: a batch cannot be read, which ends all ranks.
        """
        ...

    def undraw(self) -> None:
        """Restore the data position from before the last `draw`, for a checkpoint. No step follows."""
        ...

    def backward(self, step: int, totals: Mapping[str, float]) -> Backward:
        """Run the forward and backward passes on the drawn batches, given the amounts of all ranks.

        Calls `ranks.step_context.start_waiting` before the first collective.
        """
        ...

    def update(self, backward: Backward, sums: Tensor) -> None:
        """Apply the gradients; called only if losses and gradients are finite on every rank.

        Args:
            sums: `backward.sums` summed over ranks, on the CPU.
        """
        ...


class Request(NamedTuple):
    """A rank's request to end the run, which it passes to all ranks in a reduction."""

    stop: bool = False
    """End the run, with a checkpoint."""
    error: UserError | None = None
    """End the run with this error."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of a completed or skipped step."""

    stop: bool
    """A rank requested a stop during the step."""
    metrics: Callable[[], dict[str, float]]
    """Compute the metrics, which are equal on all ranks; a skipped step has `nan_guard.SKIPPED` among them.
    Called at most once, during the next step; does not wait for the device."""


class Stepper:
    """Runner of a task's steps on all ranks."""

    def __init__(self, task: Steps, config: RunConfig, ranks: Ranks) -> None:
        self.task, self.ranks = task, ranks
        self.guard = StepGuard(config.guard, ranks)
        self.stragglers = StragglerDetector(config.slow_ranks, ranks)

    def step(
        self, step: int, request: Request | None = None, during_backward: Callable[[], Request] = Request
    ) -> StepResult | None:
        """Run one step.

        Collective: every rank must call it.

        Args:
            request: this rank's request since the previous step.
            during_backward: called while the device runs the backward passes; returns this rank's request at
                that time.

        Returns:
            None if a rank requested a stop before the step: nothing was done, the data position is unchanged.

        Raises:
            SharedError: a rank has an error, or too many steps in a row were not finite.
        """
        task, ranks, request = self.task, self.ranks, request or Request()
        context = ranks.step_context
        context.begin(step)
        amounts: Sequence[float] = [0.0] * len(task.amounts)
        failed: UserError | None = None
        try:
            amounts = task.draw(step)
        except UserError as error:
            failed = error
        context.start_waiting()
        drawn = torch.tensor([*amounts, failed is not None], dtype=torch.float64)
        stop, (totals,) = reduce_step(ranks, drawn, stop=request.stop, error=request.error)
        if stop:
            task.undraw()
            return None
        if totals[-1]:
            raise_shared(failed, ranks)
        context.stop_waiting()
        backward = task.backward(step, dict(zip(task.amounts, totals.tolist(), strict=False)))
        context.start_waiting()

        finiteness = self.guard.inspect(backward.losses, backward.engines)
        request = during_backward()
        busy_time = self.stragglers.busy_time()
        stop, (finiteness, sums, busy_times) = reduce_step(
            ranks, finiteness, backward.sums, busy_time, stop=request.stop, error=request.error
        )
        passed = self.guard.passes(finiteness.tolist())
        if passed:
            task.update(backward, sums)
        metrics = backward.metrics  # the closure must not keep `backward`, which holds device memory
        return StepResult(stop=stop, metrics=lambda: self._metrics(metrics(sums), busy_times, passed))

    def _metrics(self, metrics: dict[str, float], busy_times: Tensor, passed: bool) -> dict[str, float]:
        skipped = {} if passed else {SKIPPED: 1.0}
        return metrics | skipped | self.stragglers.compare(busy_times)
