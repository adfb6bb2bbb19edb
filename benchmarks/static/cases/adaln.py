"""adaLN at the width of DiT-XL, and at a width that is not a multiple of a vector."""

from collections.abc import Mapping
from functools import partial

import torch

from benchmarks.static.budgets import MEMORY, SMALL, Budget, Case
from cat_fast.kernels.adaln import triton as adaln

TOKENS, SEQUENCES = 16384, 64
UNALIGNED = Budget(kind="memory-bound, rows not aligned")


def launch(
    features: int,
    dtype: torch.dtype,
    modulation: torch.dtype,
    gated: bool,
    branch: torch.dtype | None = None,
) -> None:
    """Run forward and backward; the modulation are views of one (S, 6 D) tensor.

    `branch` is the dtype of h and y under autocast; that of the tokens if None.
    """
    tokens = torch.empty(TOKENS, features, dtype=dtype, device="meta")
    rows = torch.empty(SEQUENCES, 6 * features, dtype=modulation, device="meta")
    gate, shift, scale, *_ = rows.chunk(6, dim=1)
    cu_seqlens = torch.empty(SEQUENCES + 1, dtype=torch.int32, device="meta")
    if gated:
        h = tokens if branch is None else tokens.to(branch)
        x_new, y, *statistics = adaln.gate_residual_adaln_forward(
            tokens, h, gate, shift, scale, cu_seqlens, 1e-6
        )
        adaln.gate_residual_adaln_backward(tokens, y, x_new, h, gate, scale, cu_seqlens, *statistics)
    else:
        _y, *statistics = adaln.adaln_forward(tokens, shift, scale, cu_seqlens, 1e-6)
        adaln.adaln_backward(tokens, tokens, scale, cu_seqlens, *statistics)


def budgets(kind: Budget) -> Mapping[str, Budget]:
    return {"adaln_forward_kernel": kind, "adaln_backward_kernel": kind, "adaln_combine_kernel": SMALL}


CASES = {
    f"{'gate_residual_' if gated else ''}adaln.{key}": Case(
        launch=partial(launch, features, dtype, modulation, gated, branch), budgets=budgets(kind)
    )
    for key, features, dtype, modulation, branch, kind in (
        ("1152_bfloat16", 1152, torch.bfloat16, torch.bfloat16, None, MEMORY),
        ("1152_bfloat16_float32_rows", 1152, torch.bfloat16, torch.float32, None, MEMORY),
        ("1152_float32", 1152, torch.float32, torch.float32, None, MEMORY),
        ("1152_float32_bfloat16_branch", 1152, torch.float32, torch.bfloat16, torch.bfloat16, MEMORY),
        ("1001_float16", 1001, torch.float16, torch.float16, None, UNALIGNED),
    )
    for gated in (False, True)
}
