"""GroupNorm + SiLU of the nested VAE's largest and smallest features, in both memory formats."""

from functools import partial

import torch

from benchmarks.static.budgets import MEMORY, SMALL, Case
from cat_fast.kernels.group_norm_silu import triton as group_norm_silu

GROUPS = 32


def launch(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    biased: bool = False,
) -> None:
    """Run forward and backward, if `biased` with an input bias."""
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=memory_format)
    weight = torch.empty(shape[1], device="meta")
    if biased:
        parameters = weight, weight, weight
        _y, *statistics = group_norm_silu.group_norm_silu_biased_triton(x, *parameters, GROUPS, 1e-6, True)
        group_norm_silu.group_norm_silu_biased_backward_triton(x, x, *parameters, *statistics, GROUPS, True)
        return
    _y, mean, rstd = group_norm_silu.group_norm_silu_triton(x, weight, weight, GROUPS, 1e-6, True)
    group_norm_silu.group_norm_silu_backward_triton(x, x, weight, weight, mean, rstd, GROUPS, True)


BUDGETS = {
    **dict.fromkeys(("partial_moments", "normalize", "partial_gradients", "input_gradient"), MEMORY),
    **dict.fromkeys(("combine_moments", "combine_group_gradients", "combine_channel_gradients"), SMALL),
}
CASES = {
    f"group_norm_silu.{'x'.join(map(str, shape))}_{str(dtype).removeprefix('torch.')}_{order}": Case(
        launch=partial(launch, shape, dtype, memory_format), budgets=BUDGETS
    )
    for shape in ((1, 64, 512, 512), (8, 512, 16, 16))
    for dtype in (torch.bfloat16, torch.float32)
    for order, memory_format in (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    )
}
CASES["group_norm_silu.1x64x512x512_bfloat16_channels_last_input_bias"] = Case(
    launch=partial(launch, (1, 64, 512, 512), torch.bfloat16, torch.channels_last, biased=True),
    budgets=BUDGETS,
)
