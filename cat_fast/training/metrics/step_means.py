"""The two reductions that ranks do together in each step, and the means that are made of them.

    before the forward pass     amounts known from the batches (images, tokens, seconds), draws that failed
    after the backward passes   what the guard decides by, weighted sums and weights of every metric

Each is one all-reduce of one float64 vector, led by two flags (a stop request, an error) and read with one
transfer: the only two points of a step at which our own code waits for a device. Both decide how the step
goes on. What nothing depends on, the metrics, comes with the second transfer and is left as a tensor on the
CPU: it is turned into named values and logged while the next step's backward passes run.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cat_fast.training.runtime.collective_errors import raise_shared
from cat_fast.training.runtime.ranks import Ranks


def reduce_step(
    ranks: Ranks, *parts: Tensor, stop: bool = False, error: Exception | None = None
) -> tuple[bool, list[Tensor]]:
    """Collective: sum the parts over ranks and agree on stop requests and errors, in one all-reduce.

    Args:
        parts: of any shapes, which are the same on all ranks; on the CPU or the rank's device.
        stop: True if this rank was asked to end the run.
        error: one that ends the run, of this rank.

    Returns:
        True if any rank was asked to stop, and the sums, float64 on the CPU.

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
    """Weighted sums of a step's values at each ratio, on this rank.

    Args:
        names: of the values.
        ratios: those that batches can have.
    """

    def __init__(self, names: Sequence[str], ratios: Sequence[int], device: torch.device) -> None:
        self.names, self.ratios = list(names), list(ratios)
        self.table = torch.zeros(len(ratios), len(names) + 1, dtype=torch.float64, device=device)
        """(R, N + 1): the sums, and the weight in the last column."""

    def add(self, ratio: int, values: Mapping[str, Tensor], weight: float) -> None:
        """Add the mean values of a batch; scalars, named as `names`."""
        row = torch.stack([values[name] for name in self.names]).double()
        self.table[self.ratios.index(ratio)] += torch.cat([row, row.new_ones(1)]) * weight


def means(names: Sequence[str], table: Tensor) -> dict[str, float]:
    """Return the mean of each value over everything, from a summed `RatioSums.table`."""
    return dict(zip(names, (table.sum(0) / table[:, -1].sum()).tolist(), strict=False))


def means_at_ratios(names: Sequence[str], ratios: Sequence[int], table: Tensor) -> dict[str, float]:
    """Return the mean of each value at each ratio that has any weight, as `name_8x`."""
    return {
        f"{name}_{ratio}x": value / row[-1]
        for ratio, row in zip(ratios, table.tolist(), strict=True)
        if row[-1]
        for name, value in zip(names, row, strict=False)
    }
