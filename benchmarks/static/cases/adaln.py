"""adaLN at the width of DiT-XL, and at one that fills no vector."""

from collections.abc import Mapping
from functools import partial

import torch

from benchmarks.static.budgets import MEMORY, SMALL, Budget, Case
from cat_fast.kernels.adaln import triton as adaln

TOKENS, SEQUENCES = 16384, 64
UNALIGNED = Budget(kind="memory-bound, rows not aligned", occupancy=0.5)


def launch(features: int, dtype: torch.dtype, gated: bool) -> None:
    """Forward and backward, the modulation being views into one (S, 6 D)."""
    tokens = torch.empty(TOKENS, features, dtype=dtype, device="meta")
    gate, shift, scale, *_ = torch.empty(SEQUENCES, 6 * features, dtype=dtype, device="meta").chunk(6, dim=1)
    cu_seqlens = torch.empty(SEQUENCES + 1, dtype=torch.int32, device="meta")
    if gated:
        x_new, _y, *statistics = adaln.gate_residual_adaln_forward(
            tokens, tokens, gate, shift, scale, cu_seqlens, 1e-6
        )
        adaln.gate_residual_adaln_backward(
            tokens, tokens, x_new, tokens, gate, scale, cu_seqlens, *statistics
        )
    else:
        _y, *statistics = adaln.adaln_forward(tokens, shift, scale, cu_seqlens, 1e-6)
        adaln.adaln_backward(tokens, tokens, scale, cu_seqlens, *statistics)


def budgets(kind: Budget) -> Mapping[str, Budget]:
    return {"adaln_forward_kernel": kind, "adaln_backward_kernel": kind, "adaln_combine_kernel": SMALL}


CASES = {
    f"{'gate_residual_' if gated else ''}adaln.{features}_{str(dtype).removeprefix('torch.')}": Case(
        launch=partial(launch, features, dtype, gated), budgets=budgets(MEMORY if aligned else UNALIGNED)
    )
    for features, dtype, aligned in (
        (1152, torch.bfloat16, True),
        (1152, torch.float32, True),
        (1001, torch.float16, False),
    )
    for gated in (False, True)
}
