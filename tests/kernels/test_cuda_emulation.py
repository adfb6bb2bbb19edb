"""The CUDA kernels of GroupNorm + SiLU, executed on the CPU (csrc/emulation): no GPU is needed."""

import ctypes

import pytest
import torch

from cat_fast.kernels.group_norm_silu.reference import group_norm_silu_reference
from tests.kernels.emulation import check_races, compile_emulation, pointer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # cat_fast::group_norm_silu::Dtype
CHUNK = 2048  # elements; smaller than kCudaChunkElements, so that small tensors have several chunks


class Shape(ctypes.Structure):
    """cat_fast::group_norm_silu::Shape."""

    _fields_ = (
        ("samples", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("spatial", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("channels_last", ctypes.c_bool),
        ("chunk", ctypes.c_int64),
        ("chunks", ctypes.c_int64),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / "group_norm_silu.so"
    compile_emulation("group_norm_silu", path, "-shared", "-fPIC")
    library = ctypes.CDLL(str(path))
    library.workspace_floats.restype = ctypes.c_int64
    return library


def run_emulated(library, x, weight, bias, grad, groups, eps, activation):
    """y, dx, dweight, dbias of the CUDA kernels; memory they should write begins as NaN."""
    channels_last = not x.is_contiguous()
    spatial = x[0, 0].numel()
    chunk = max(1, CHUNK // x.shape[1]) if channels_last else CHUNK
    shape = Shape(x.shape[0], x.shape[1], spatial, groups, channels_last, chunk, -(-spatial // chunk))
    nan = float("nan")
    y, dx = torch.full_like(x, nan), torch.full_like(x, nan)
    mean, rstd = torch.full((2, x.shape[0], groups), nan).unbind()
    dweight, dbias = torch.full((2, x.shape[1]), nan).unbind()
    workspace = torch.full((library.workspace_floats(ctypes.byref(shape)),), nan)
    scratch = pointer(workspace)
    flag, dtype = ctypes.c_int(activation), ctypes.c_int(DTYPES.index(x.dtype))
    parameters = pointer(weight), pointer(bias)
    statistics = pointer(mean), pointer(rstd)
    first = dtype, ctypes.byref(shape)
    library.forward(
        *first, pointer(x), *parameters, ctypes.c_float(eps), flag, pointer(y), *statistics, scratch
    )
    workspace.fill_(nan)
    library.backward(
        *first,
        pointer(grad),
        pointer(x),
        *parameters,
        *statistics,
        flag,
        *map(pointer, (dx, dweight, dbias)),
        scratch,
    )
    return y, dx, dweight, dbias


# 16-byte packs and single elements, two channels a group, several chunks and column tiles, idle threads.
@pytest.mark.parametrize(
    ("shape", "groups", "channels_last", "dtype", "activation"),
    [
        ((2, 8, 64, 40), 4, False, torch.float32, True),
        ((2, 6, 13, 7), 3, False, torch.float32, True),
        ((1, 4, 48, 48), 2, False, torch.bfloat16, True),
        ((1, 4, 10, 63), 2, False, torch.float16, True),
        ((2, 24, 16, 9), 12, True, torch.float32, True),
        ((1, 300, 5, 3), 3, True, torch.float32, True),
        ((2, 64, 12, 12), 32, True, torch.bfloat16, True),
        ((1, 48, 9, 11), 4, True, torch.float16, True),
        ((1, 6, 31, 33), 2, True, torch.float32, False),
    ],
    ids=str,
)
def test_cuda_kernels_match_float64(library, shape, groups, channels_last, dtype, activation):
    torch.manual_seed(0)
    order = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (
        t.to(dtype).contiguous(memory_format=order) for t in (torch.randn(shape) + 2, torch.randn(shape))
    )
    weight, bias = torch.randn(2, shape[1]).unbind()
    got = run_emulated(library, x, weight, bias, grad, groups, 1e-5, activation)

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = group_norm_silu_reference(*leaves, groups, 1e-5, activation)
    want = y.detach(), *torch.autograd.grad(y, leaves, grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, ours, truth in zip(("y", "dx", "dweight", "dbias"), got, want, strict=True):
        scale = truth.abs().max().clamp(min=1.0)
        error = (ours.double() - truth).abs().max() / scale
        assert error < tolerance, f"{name}: {error:.1e}"  # also fails for NaN


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "with a missing __syncthreads"])
def test_cuda_kernels_have_no_data_race(tmp_path, planted):
    write_then_sync = "shared[threadIdx.x * V + j] = sums[j];\n  __syncthreads();"
    check_races(
        "group_norm_silu", tmp_path, "group_norm_silu/kernels.cuh", write_then_sync if planted else None
    )
