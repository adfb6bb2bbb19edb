"""Packing mixed-ratio latents and unpacking them: 16 channels, patches of 2 x 2."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.static.budgets import MEMORY, Case
from cat_fast.kernels.pack import triton

SIDES = (64, 32, 16, 64)
GRIDS = [side // 2 for side in SIDES for _ in range(2)]


def pack(dtype: torch.dtype, memory_format: torch.memory_format) -> torch.Tensor:
    latents = [torch.empty(1, 16, s, s, dtype=dtype, device="meta") for s in SIDES]
    return triton.pack([x.to(memory_format=memory_format)[0] for x in latents], 2)


def unpack(dtype: torch.dtype) -> list[torch.Tensor]:
    count = sum(side**2 // 4 for side in SIDES)
    return triton.unpack(torch.empty(count, 64, dtype=dtype, device="meta"), GRIDS, 2)


def _case(launch: Callable[..., Any], *arguments: Any) -> Case:
    return Case(launch=partial(launch, *arguments), budgets={"_move_kernel": MEMORY})


CASES = {
    f"pack.{str(dtype).removeprefix('torch.')}.{name}": _case(launch, dtype, *arguments)
    for dtype in (torch.float32, torch.bfloat16)
    for name, launch, *arguments in (
        ("contiguous", pack, torch.contiguous_format),
        ("channels_last", pack, torch.channels_last),
        ("unpack", unpack),
    )
}
