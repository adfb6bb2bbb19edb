"""Skip steps with non-finite losses or gradients on all ranks; end the run after too many in a row.

A NaN loss on one rank makes the averaged gradient NaN on all ranks. One optimiser step with it ruins weights
and moments for good. So between the backward passes and `engine.step()` the ranks agree whether all
losses and gradient norms are finite. If not, the gradients are dropped, and weights, moments and averages
stay unchanged; step number, schedule and data advance.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cat_fast.training.config.settings import GuardConfig
from cat_fast.training.runtime.collective_errors import SharedError
from cat_fast.training.runtime.gradient_norm import offloads, use_norm
from cat_fast.training.runtime.ranks import Ranks

SKIPPED = "skipped"
"""Metric that is 1 in a skipped step. Non-finite terms of such a step are not logged."""


class StepGuard:
    """Agreement of all ranks on whether a step is applied or skipped.

    Once per step, after the backward passes and before any `engine.step()`, the ranks sum the result of
    `inspect`, and `passes` decides by the sums. On False, the caller must not change the task's state. The
    backward passes run in any case: they contain collectives, and a rank does not know the other ranks'
    losses before them.
    """

    def __init__(self, config: GuardConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.consecutive = 0
        self.skipped = 0
        self._bad_losses: dict[str, Tensor] = {}
        self._engines: Mapping[str, Any] = {}

    def inspect(self, losses: Mapping[str, Tensor], engines: Mapping[str, Any]) -> Tensor:
        """Compute this rank's contribution to the decision, without waiting for the device.

        Args:
            losses: by name, as in the message: (A,), one value per accumulation step, or scalars.
            engines: E engines that hold gradients, by name.

        Returns:
            (1 + E,) float64 on the device: 1 if a loss of this rank is not finite, then each engine's squared
            gradient norm.
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
        """Return True if everything inspected is finite on all ranks, given the sums over ranks.

        If True, the engines clip by the norms of these sums, see `use_norm`. Collective if False: drops the
        engines' gradients; rank 0 logs the terms, ranks and batches.

        Raises:
            SharedError: `max_bad_steps` steps in a row were not finite.
        """
        bad_ranks, *squares = sums
        # DeepSpeed computes its norm in float32 and treats one beyond that range as an overflow.
        largest = torch.finfo(torch.float32).max
        bad_norms = [
            name for name, square in zip(self._engines, squares, strict=True) if not square <= largest
        ]
        if not bad_ranks and not bad_norms:
            self.consecutive = 0
            for engine, square in zip(self._engines.values(), squares, strict=True):
                use_norm(engine, square)
            return True
        for engine in self._engines.values():
            discard_gradients(engine)
        self.consecutive += 1
        self.skipped += 1
        bad_by_batch = [
            [name for name, is_bad in zip(self._bad_losses, flags, strict=True) if is_bad]
            for flags in zip(*(bad.tolist() for bad in self._bad_losses.values()), strict=True)
        ]
        self._log_skipped_step(bad_by_batch, bad_norms)
        return False

    def _log_skipped_step(self, bad_losses: list[list[str]], bad_norms: list[str]) -> None:
        """Log the bad terms on rank 0, or raise after too many steps. `bad_losses` are names per batch."""
        context = self.ranks.step_context
        reports = self.ranks.gather((bad_losses, list(context.batches)))
        causes = [
            f"{', '.join(_first_causes(names))} of rank {rank} ({batch})"
            for rank, (by_batch, batches) in enumerate(reports)
            for names, batch in zip(by_batch, batches or ["unknown batch"], strict=True)
            if names
        ]
        if not causes:
            causes = [f"the gradient norm of the {', '.join(bad_norms)}, though all losses were finite"]
            causes += [f"rank {rank} had {'; '.join(batches)}" for rank, (_, batches) in enumerate(reports)]
        cause = f"not finite: {'; '.join(causes)}"
        if self.consecutive >= self.config.max_bad_steps:
            raise SharedError(
                f"{self.consecutive} steps in a row, up to step {context.step}, were {cause}. Saved "
                "checkpoints are unchanged: check those files, or lower optimizer.lr, and restart"
            )
        if self.ranks.is_main:
            count = f"{self.consecutive} in a row, {self.skipped} in total"
            print(f"step {context.step} skipped ({count}), {cause}", file=sys.stderr, flush=True)


def _first_causes(names: list[str]) -> list[str]:
    """Return the original bad terms, without the weighted copies and the sum that follow from them."""
    terms = [name for name in names if name != "loss" and not name.startswith("weighted/")]
    return terms or names


def _square_norm(engine: Any, device: torch.device) -> Tensor:
    """Return the sum of squares of this rank's gradients.

    It is only checked for finiteness, so gradients that are replicated without ZeRO may count several times.
    """
    by_device: dict[torch.device, list[Tensor]] = {}  # offloaded gradients are on the CPU
    for gradient in _gradients(engine):
        by_device.setdefault(gradient.device, []).append(gradient.detach())
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradients in by_device.values():  # a few launches for all tensors
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
        total += torch.stack(norms).square().sum().to(device)
    return total


def _gradients(engine: Any) -> Iterator[Tensor]:
    """Yield the gradients that `engine.step()` would apply: this rank's partition under ZeRO, else all."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "averaged_gradients"):  # ZeRO 1, 2 and 3
        for group in optimizer.averaged_gradients.values():
            yield from group or ()
        if offloads(optimizer):
            stage_2, stage_3 = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"
            flat = getattr(optimizer, stage_2 if hasattr(optimizer, stage_2) else stage_3)
            yield from (p.grad for p in flat if p.grad is not None)
    else:
        yield from (p.grad for p in engine.module.parameters() if p.grad is not None)


def discard_gradients(engine: Any) -> None:
    """Drop the gradients accumulated since the last `engine.step()`, as DeepSpeed does on overflow.

    DeepSpeed's own overflow path cannot be called: it depends on its own check, which is enabled only for
    some precisions and stages.
    """
    optimizer = engine.optimizer
    for held in ("averaged_gradients", "all_grad_tensors"):
        groups = getattr(optimizer, held, {})
        for group in list(groups):
            groups[group] = None
    if offloads(optimizer):
        optimizer.reset_cpu_buffers()
    if hasattr(optimizer, "micro_step_id"):
        optimizer.micro_step_id = -1  # as after a step; under stage 3 zero_grad resets it
    optimizer.zero_grad()
    engine.zero_grad()
    # Also drop the backward passes of an unfinished accumulation.
    engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()
