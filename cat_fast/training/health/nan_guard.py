"""Steps that are not finite are skipped, by all ranks together; too many in a row end the run.

A loss that is NaN on one rank makes the averaged gradient NaN on all, and one optimiser step with it ruins
weights and moments for good. So between the backward passes and `engine.step()` the ranks agree whether all
losses and gradient norms are finite. If not, the gradients are dropped, and weights, moments and averages
stay as they were; step number, schedule and data go on.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cat_fast.training.config.settings import GuardConfig
from cat_fast.training.runtime.collective_errors import SharedError
from cat_fast.training.runtime.ranks import Ranks

SKIPPED = "skipped"
"""Metric of a skipped step, 1; its terms that are not finite are left out of the log."""


class StepGuard:
    """Lets a step pass on all ranks or on none.

    Once per step, after every backward pass and before any `engine.step()`, the ranks sum what `inspect`
    returns, and `passes` decides by the sums. On False, everything that would change a task's state is left
    out. The backward passes run either way: their collectives belong to all ranks, and no rank has to know of
    another's loss before them.
    """

    def __init__(self, config: GuardConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.in_a_row = 0
        self.skipped = 0
        self._bad_losses: dict[str, Tensor] = {}
        self._engines: Mapping[str, Any] = {}

    def inspect(self, losses: Mapping[str, Tensor], engines: Mapping[str, Any]) -> Tensor:
        """Return (1 + E,) float64 on the device: 1 where a loss of this rank is not finite, and the square of
        each engine's gradient norm. Waits for nothing.

        Losses are (P,), one for each part of `ranks.work`, or scalars; names are those of the message.
        """
        device = self.ranks.device
        self._engines = engines
        self._bad_losses = {
            name: ~torch.isfinite(loss.detach()).reshape(-1).to(device) for name, loss in losses.items()
        }
        is_bad = torch.stack(list(self._bad_losses.values())).any()
        squares = [_square_norm(engine, device) for engine in engines.values()]
        return torch.stack([is_bad.double(), *squares])

    def passes(self, sums: Sequence[float]) -> bool:
        """Return True if all that was inspected on all ranks is finite, given its sums over ranks.

        Collective if not: the engines' gradients are dropped, and rank 0 tells terms, ranks and batches.

        Raises:
            SharedError: `max_bad_steps` in a row did not pass.
        """
        bad_ranks, *squares = sums
        # DeepSpeed computes its norm in float32 and takes one beyond that range for an overflow.
        largest = torch.finfo(torch.float32).max
        bad_norms = [
            name for name, square in zip(self._engines, squares, strict=True) if not square <= largest
        ]
        if not bad_ranks and not bad_norms:
            self.in_a_row = 0
            return True
        for engine in self._engines.values():
            discard_gradients(engine)
        self.in_a_row += 1
        self.skipped += 1
        by_part = [
            [name for name, is_bad in zip(self._bad_losses, part, strict=True) if is_bad]
            for part in zip(*(bad.tolist() for bad in self._bad_losses.values()), strict=True)
        ]
        self._tell(by_part, bad_norms)
        return False

    def _tell(self, bad_losses: list[list[str]], bad_norms: list[str]) -> None:
        """`bad_losses` by name, of each part of this rank's work."""
        work = self.ranks.work
        reports = self.ranks.gather((bad_losses, list(work.parts)))
        culprits = [
            f"{', '.join(_causes(names))} of rank {rank} ({part})"
            for rank, (by_part, parts) in enumerate(reports)
            for names, part in zip(by_part, parts or ["no batch told"], strict=True)
            if names
        ]
        if not culprits:
            culprits = [f"the gradient norm of the {', '.join(bad_norms)}, though all losses were finite"]
            culprits += [f"rank {rank} had {'; '.join(parts)}" for rank, (_, parts) in enumerate(reports)]
        what = f"not finite: {'; '.join(culprits)}"
        if self.in_a_row >= self.config.max_bad_steps:
            raise SharedError(
                f"{self.in_a_row} steps in a row, the last of them step {work.step}, were {what}. What was "
                "saved is untouched: look at those files, or lower optimizer.lr, and start again"
            )
        if self.ranks.is_main:
            count = f"{self.in_a_row} in a row, {self.skipped} in all"
            print(f"step {work.step} skipped ({count}), {what}", file=sys.stderr, flush=True)


def _causes(names: list[str]) -> list[str]:
    """The terms that went wrong first: not their weighted copies, not the sum."""
    terms = [name for name in names if name != "loss" and not name.startswith("weighted/")]
    return terms or names


def _square_norm(engine: Any, device: torch.device) -> Tensor:
    """Sum of squares of the gradients that this rank holds. All that is asked of it is whether it is finite,
    so the copies that every rank holds without ZeRO may count several times."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in _gradients(engine):
        total += torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64).square().to(device)
    return total


def _gradients(engine: Any) -> Iterator[Tensor]:
    """What a backward pass left for `engine.step()`: this rank's partition under ZeRO, else all of it."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "averaged_gradients"):  # ZeRO 1, 2 and 3
        for group in optimizer.averaged_gradients.values():
            yield from group or ()
        if _offloads(optimizer):
            stage_2, stage_3 = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"
            flat = getattr(optimizer, stage_2 if hasattr(optimizer, stage_2) else stage_3)
            yield from (p.grad for p in flat if p.grad is not None)
    else:
        yield from (p.grad for p in engine.module.parameters() if p.grad is not None)


def discard_gradients(engine: Any) -> None:
    """Forget what the backward passes since the last `engine.step()` left, as DeepSpeed does on overflow.

    That path of its own cannot be asked for: it is taken for what its own check finds, which is switched by
    precision and stage.
    """
    optimizer = engine.optimizer
    for held in ("averaged_gradients", "all_grad_tensors"):
        groups = getattr(optimizer, held, {})
        for group in list(groups):
            groups[group] = None
    if _offloads(optimizer):
        optimizer.reset_cpu_buffers()
    if hasattr(optimizer, "micro_step_id"):
        optimizer.micro_step_id = -1  # as after a step; stage 3 has its zero_grad set its own start
    optimizer.zero_grad()
    engine.zero_grad()
    # Backward passes of an unfinished accumulation are forgotten, too.
    engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()


def _offloads(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))
