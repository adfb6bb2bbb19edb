"""Tiled processing of large images: overlapping tiles whose results are blended.

Normalisation and attention see one tile at a time, so neighbouring tiles disagree slightly where they
overlap. Linear blending over the overlap avoids seams.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor


def check_tiles(size: int, overlap_factor: float, ratios: Sequence[int]) -> None:
    """Check that tiles and their overlaps are a whole number of latent pixels at each of `ratios`.

    Args:
        size: side of a tile in pixels.
        overlap_factor: overlap of neighbouring tiles, as a part of `size`.

    Raises:
        ValueError: sizes that are not multiples of a ratio, or an overlap of zero or over half a tile.
    """
    if not 0 < overlap_factor <= 0.5:
        raise ValueError(f"tile_overlap_factor: expected more than 0 and at most 0.5, got {overlap_factor}")
    overlap = size * overlap_factor
    for ratio in ratios:
        if size <= 0 or size % ratio or overlap % ratio:
            raise ValueError(
                f"tiles of {size} px with an overlap of {overlap:g} px: "
                f"both must be multiples of the ratio {ratio}"
            )


def tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    cell_in: int,
    cell_out: int,
    size: int,
    overlap: int,
) -> Tensor:
    """Apply `function` to overlapping tiles of x and blend the results linearly across the overlaps.

    The image is a grid of cells with sides of `cell_in` pixels in x and `cell_out` pixels in the result.

    Args:
        function: maps n x m cells, (B, C, n * cell_in, m * cell_in), to (B, C', n * cell_out, m * cell_out).
        size: side of a tile in cells.
        overlap: overlap of neighbouring tiles in cells.
    """
    rows, columns = (side // cell_in for side in x.shape[-2:])
    total: Tensor | None = None
    weights = x.new_zeros(rows * cell_out, columns * cell_out, dtype=torch.float32)
    for (top, height), (left, width) in product(_spans(rows, size, overlap), _spans(columns, size, overlap)):
        tile = x[..., top * cell_in : (top + height) * cell_in, left * cell_in : (left + width) * cell_in]
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
    """Return (first cell, number of cells) of each tile along a side; the last tile ends at the edge."""
    if cells <= size:
        return [(0, cells)]
    starts = [*range(0, cells - size, size - overlap), cells - size]
    return [(start, size) for start in starts]


def _fade(first: int, count: int, cells: int, overlap: int, cell: int, device: torch.device) -> Tensor:
    """Return a tile's weights along one side: ramps over the overlaps, 1 elsewhere."""
    weight = torch.ones(count * cell, device=device)
    ramp = (torch.arange(overlap * cell, device=device) + 0.5) / (overlap * cell)
    if first > 0:
        weight[: len(ramp)] = ramp
    if first + count < cells:
        weight[-len(ramp) :] = torch.minimum(weight[-len(ramp) :], ramp.flip(0))
    return weight
