"""The two all-reduces per step, and the means of metrics over all ranks.

    before the forward pass     amounts known from the batches (images, tokens, seconds), failed draws
    after the backward passes   input of the non-finite guard, weighted sums and weights of every metric

Each is one all-reduce of a float64 vector, which starts with two flags (stop request, error). Each is read
with one transfer; our own code waits for the device at no other point of a step. The metrics arrive with the
second transfer as a CPU tensor. They are named and logged while the next step's backward passes run.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cat_fast.training.runtime.collective_errors import raise_shared
from cat_fast.training.runtime.ranks import Ranks


def reduce_step(
    ranks: Ranks, *parts: Tensor, stop: bool = False, error: Exception | None = None
) -> tuple[bool, list[Tensor]]:
    """Collective: sum tensors over ranks and share stop requests and errors, in one all-reduce.

    Args:
        parts: tensors of any shapes, equal on all ranks; on the CPU or the rank's device.
        stop: True if this rank received a stop request.
        error: an error of this rank that ends the run.

    Returns:
        True if any rank received a stop request, and the sums, float64 on the CPU.

    Raises:
        SharedError: any rank has an error.
    """
    flags = torch.tensor([stop, error is not None])
    vector = torch.cat([part.double().flatten().to(ranks.device) for part in (flags, *parts)])
    sums = ranks.sum(vector).cpu()
    stops, errors = sums[:2].tolist()
    if errors:
        raise_shared(error, ranks)
    pieces = sums[2:].split([part.numel() for part in parts])
    return stops > 0, [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


class RatioSums:
    """This rank's weighted sums of a step's metrics, per ratio.

    Args:
        names: names of the metrics.
        ratios: all ratios that batches can have.
    """

    def __init__(self, names: Sequence[str], ratios: Sequence[int], device: torch.device) -> None:
        self.names, self.ratios = list(names), list(ratios)
        self.table = torch.zeros(len(ratios), len(names) + 1, dtype=torch.float64, device=device)
        """(R, N + 1): the sums, with the weight in the last column."""

    def add(self, ratio: int, values: Mapping[str, Tensor], weight: float) -> None:
        """Add a batch's mean values: one scalar for each of `names`."""
        row = torch.stack([values[name] for name in self.names]).double()
        self.table[self.ratios.index(ratio)] += torch.cat([row, row.new_ones(1)]) * weight


def means(names: Sequence[str], table: Tensor) -> dict[str, float]:
    """Return the mean of each metric over all ratios, from a `RatioSums.table` summed over ranks."""
    return dict(zip(names, (table.sum(0) / table[:, -1].sum()).tolist(), strict=False))


def means_at_ratios(names: Sequence[str], ratios: Sequence[int], table: Tensor) -> dict[str, float]:
    """Return the mean of each metric at each ratio with a nonzero weight, as `name_8x`."""
    return {
        f"{name}_{ratio}x": value / row[-1]
        for ratio, row in zip(ratios, table.tolist(), strict=True)
        if row[-1]
        for name, value in zip(names, row, strict=False)
    }
