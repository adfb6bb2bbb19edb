"""Block of rows within which matrix products round alike; packed steps are filled up to multiples of it."""

from functools import cache

import torch

from .op import linear, selected

_BLOCKS = (1, 8, 16, 32, 64)
_PRODUCTS = ((192, 576), (384, 384), (768, 192))
"""Inputs and outputs of the layers that are tried."""
_MOST_ROWS = 256


def row_invariant_block(dtype: torch.dtype) -> int | None:
    """Return the block whose multiples, as numbers of rows, round each row alike; None if there is none.

    Libraries choose kernels by the number of rows. 1 means that a row's bits never depend on the others.
    Products are those of this process on CPUs. Each library, dtype and number of threads is tried once.
    """
    return _block(selected(), dtype, torch.get_num_threads())


@cache
def _block(backend: str, dtype: torch.dtype, threads: int) -> int | None:
    generator = torch.Generator().manual_seed(0)
    for block in _BLOCKS:
        if all(_rounds_alike(*shape, block, backend, dtype, generator) for shape in _PRODUCTS):
            return block
    return None


@torch.no_grad()
def _rounds_alike(
    inputs: int, outputs: int, block: int, backend: str, dtype: torch.dtype, generator: torch.Generator
) -> bool:
    x = torch.randn(_MOST_ROWS, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    expected = linear(x, weight, backend=backend)
    counts = {block, 2 * block, 3 * block, _MOST_ROWS // 2 // block * block} | (
        {2, 5, 7} if block == 1 else set()
    )
    return all(
        torch.equal(linear(x[-rows:], weight, backend=backend), expected[-rows:])
        for rows in counts
        if rows <= _MOST_ROWS
    )
