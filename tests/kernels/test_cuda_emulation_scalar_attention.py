"""The CUDA kernels of scalar_attention, executed on CPU threads (csrc/emulation): no GPU is needed."""

import ctypes

import pytest
import torch

from cat_fast.kernels.scalar_attention.reference import scalar_attention_reference
from tests.kernels.emulation import check_races, compile_emulation, pointer

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # keys in the order of Dtype
NAMES = ("y", "dq", "dk", "dv")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / "scalar_attention.so"
    compile_emulation("scalar_attention", path, "-shared", "-fPIC")
    library = ctypes.CDLL(str(path))
    library.workspace_floats.restype = ctypes.c_int64
    return library


def run_emulated(library, q, k, v, grad):
    """y, dq, dk, dv of the CUDA kernels; memory they should write begins as NaN."""
    sizes = (ctypes.c_int64 * 3)(*q.shape)
    dtype = ctypes.c_int([*TOLERANCE].index(q.dtype))
    y, dq, dk, dv = torch.full((4, *q.shape), float("nan"), dtype=q.dtype).unbind()
    calls = (library.forward, (q, k, v, y)), (library.backward, (grad, q, k, v, dq, dk, dv))
    for function, tensors in calls:
        size = library.workspace_floats(sizes, ctypes.c_int(function is library.backward))
        workspace = torch.full((size,), float("nan"))
        function(dtype, sizes, *map(pointer, tensors), pointer(workspace))
    return y, dq, dk, dv


def inputs(shape, deviation, dtype=torch.float32):
    q, k, v, grad = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    return [t.to(dtype) for t in (q * deviation, k * deviation, v + 1, grad)]


def truths(q, k, v, grad):
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    y = scalar_attention_reference(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.double())


# One position, one chunk and several, part of a group of heads and more than one; a block or two, more blocks
# than a warp has lanes, and more than there is room for.
@pytest.mark.parametrize(
    ("shape", "deviation", "dtype"),
    [
        ((2, 1, 3), 1.0, torch.float32),
        ((1, 2, 1), 1.0, torch.float32),
        ((2, 63, 11), 0.3, torch.float32),
        ((1, 300, 9), 1.0, torch.float32),
        ((1, 200, 2), 2.5, torch.float32),
        ((1, 70, 3), 9.0, torch.float32),
        ((1, 63, 11), 1.0, torch.bfloat16),
        ((1, 63, 11), 1.0, torch.float16),
    ],
    ids=str,
)
def test_cuda_kernels_match_float64(library, shape, deviation, dtype):
    tensors = inputs(shape, deviation, dtype)
    got = run_emulated(library, *tensors)
    for name, ours, truth in zip(NAMES, got, truths(*tensors), strict=True):
        error = (ours.double() - truth).abs().max() / truth.abs().max().clamp(min=0.1)
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"  # also fails for NaN


def test_heads_summed_directly_and_by_table_share_a_tensor(library):
    q, k, v, grad = inputs((1, 70, 4), 1.0)
    q[:, :, 1] *= 10
    got = run_emulated(library, q, k, v, grad)
    for ours, truth in zip(got, truths(q, k, v, grad), strict=True):
        error = (ours.double() - truth).abs().amax((0, 1)) / truth.abs().amax((0, 1)).clamp(min=0.1)
        assert (error < TOLERANCE[torch.float32]).all()
    alone = run_emulated(library, *(t[:, :, 2:3].contiguous() for t in (q, k, v, grad)))
    for ours, single in zip(got, alone, strict=True):
        assert torch.allclose(ours[:, :, 2:3], single, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", range(4), ids=["q", "k", "v", "grad"])
def test_a_value_that_is_not_finite_makes_its_head_nan(library, where, value):
    tensors = inputs((2, 40, 3), 1.0)
    tensors[where][1, 7, 2] = value
    y, *gradients = run_emulated(library, *tensors)
    for result in gradients if where == 3 else (y, *gradients):
        assert result[1, :, 2].isnan().all()
        assert result[0].isfinite().all()
        assert result[1, :, :2].isfinite().all()


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "with a missing __syncthreads"])
def test_cuda_kernels_have_no_data_race(tmp_path, planted):
    write_then_sync = "rows[threadIdx.x] = range;\n  __syncthreads();"
    planted_in = write_then_sync if planted else None
    check_races("scalar_attention", tmp_path, "scalar_attention/plan.cuh", planted_in)
