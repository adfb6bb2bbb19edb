"""A canary: Triton's interpreter computes bf16 arithmetic wrongly, so our kernels widen what they load.

If the first test fails, upstream has fixed this, and interpreted kernels no longer need the workaround.
"""

import os

import pytest
import torch
import triton
import triton.language as tl

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles kernels here, because there is a GPU", allow_module_level=True)


@triton.jit
def _add(x_ptr, y_ptr, sum_ptr, WIDEN: tl.constexpr):
    offsets = tl.arange(0, 4)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(sum_ptr + offsets, (x + y).to(sum_ptr.dtype.element_ty))


def added(dtype, widen):
    x, y = torch.full((4,), 2.5, dtype=dtype), torch.full((4,), 2.0, dtype=dtype)
    total = torch.empty_like(x)
    _add[(1,)](x, y, total, widen)
    return total.tolist()


def test_raw_bf16_is_still_wrong():
    assert added(torch.bfloat16, False) != [4.5] * 4, (
        "Triton's interpreter now adds bf16: see the top of this file"
    )


@pytest.mark.parametrize(
    ("dtype", "widen"), [(torch.bfloat16, True), (torch.float16, False), (torch.float32, False)], ids=str
)
def test_widened_bf16_and_other_dtypes_are_right(dtype, widen):
    assert added(dtype, widen) == [4.5] * 4
