"""Large images piece by piece: overlapping tiles whose results are blended.

Normalisation and attention look at a whole tile, so that two tiles disagree a little about what they share.
Results fade into each other over the overlap, which leaves no seam.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How images are cut; both in pixels of the image and multiples of every ratio."""

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 < self.overlap <= self.size // 2:
            raise ValueError(
                f"tile overlap {self.overlap}: more than 0, and at most half of the size {self.size}"
            )

    def require_multiples_of(self, ratio: int) -> None:
        """Raises ValueError unless tiles and overlaps are whole latent pixels at `ratio`."""
        if self.size % ratio or self.overlap % ratio:
            raise ValueError(
                f"tile size {self.size} and overlap {self.overlap} must be multiples of the ratio {ratio}"
            )


def tiled(
    function: Callable[[Tensor], Tensor],
    x_BCHW: Tensor,
    *,
    cell_in: int,
    cell_out: int,
    size: int,
    overlap: int,
) -> Tensor:
    """`function` over overlapping tiles of x, blended linearly across the overlaps.

    The image is a grid of cells, each `cell_in` pixels of x and `cell_out` pixels of the result a side;
    `size` and `overlap` are in cells. `function` takes n x m cells, (B, C, n * cell_in, m * cell_in), to
    (B, C', n * cell_out, m * cell_out).
    """
    rows, columns = (side // cell_in for side in x_BCHW.shape[-2:])
    total: Tensor | None = None
    weights = x_BCHW.new_zeros(rows * cell_out, columns * cell_out, dtype=torch.float32)
    for (top, height), (left, width) in product(_spans(rows, size, overlap), _spans(columns, size, overlap)):
        tile = x_BCHW[
            ..., top * cell_in : (top + height) * cell_in, left * cell_in : (left + width) * cell_in
        ]
        result = function(tile)
        if total is None:
            total = result.new_zeros(*result.shape[:2], *weights.shape, dtype=torch.float32)
        fade = torch.outer(
            _fade(top, height, rows, overlap, cell_out, result.device),
            _fade(left, width, columns, overlap, cell_out, result.device),
        )
        here = (
            slice(top * cell_out, (top + height) * cell_out),
            slice(left * cell_out, (left + width) * cell_out),
        )
        total[..., here[0], here[1]] += result * fade
        weights[here] += fade
    assert total is not None
    return (total / weights).to(result.dtype)


def _spans(cells: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """(first cell, cells) of each tile along a side; the last is moved back to end where the image does."""
    if cells <= size:
        return [(0, cells)]
    starts = [*range(0, cells - size, size - overlap), cells - size]
    return [(start, size) for start in starts]


def _fade(first: int, count: int, cells: int, overlap: int, cell: int, device: torch.device) -> Tensor:
    """A tile's weight along one side: rising and falling over the overlaps, 1 at the image's own edges."""
    weight = torch.ones(count * cell, device=device)
    ramp = (torch.arange(overlap * cell, device=device) + 0.5) / (overlap * cell)
    if first > 0:
        weight[: len(ramp)] = ramp
    if first + count < cells:
        weight[-len(ramp) :] = torch.minimum(weight[-len(ramp) :], ramp.flip(0))
    return weight
