"""group_norm_silu: every backend of this machine against float64, forward and gradients.

The CUDA kernels are also executed on CPU threads (csrc/emulation), which needs no GPU.
"""

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from cat_fast.errors import UserError
from cat_fast.kernels import backends
from cat_fast.kernels.group_norm_silu.op import group_norm_silu
from cat_fast.kernels.group_norm_silu.reference import group_norm_silu_reference
from tests.kernels.emulation import check_races, compile_emulation, pointer

BACKENDS = ["cpp", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]
# (shape, groups): odd sizes, two channels per group, more than one chunk, no spatial dimension, one sample.
CONTIGUOUS = [
    ((2, 64, 7, 5), 32),
    ((3, 6, 9, 1), 3),
    ((1, 12, 53, 61), 4),
    ((1, 12, 211, 199), 4),
    ((2, 8, 63), 2),
    ((2, 12, 3, 5, 7), 3),
    ((4, 12), 2),
]
CHANNELS_LAST = [(shape, groups) for shape, groups in CONTIGUOUS if len(shape) in (4, 5)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # of the largest value
EVERYTHING = [
    (*case, channels_last, dtype, activation)
    for cases, channels_last in ((CONTIGUOUS, False), (CHANNELS_LAST, True))
    for case in cases
    for dtype, activation in [*((dtype, True) for dtype in backends.FLOATS), (torch.float32, False)]
]
# 16-byte packs and single elements, two channels per group, several chunks and column tiles, idle threads.
EMULATED = [
    ((2, 8, 64, 40), 4, False, torch.float32, True),
    ((2, 6, 13, 7), 3, False, torch.float32, True),
    ((1, 4, 48, 48), 2, False, torch.bfloat16, True),
    ((1, 4, 10, 63), 2, False, torch.float16, True),
    ((2, 24, 16, 9), 12, True, torch.float32, True),
    ((1, 300, 5, 3), 3, True, torch.float32, True),
    ((2, 64, 12, 12), 32, True, torch.bfloat16, True),
    ((1, 48, 9, 11), 4, True, torch.float16, True),
    ((1, 6, 31, 33), 2, True, torch.float32, False),
]
CASES = [
    *(("cpp", *case) for case in EVERYTHING),
    *(("triton", *case) for case in EVERYTHING),
    *(("emulated", *case) for case in EMULATED),
    *(pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in EVERYTHING),
]
WITH_INPUT_BIAS = [
    *(
        (backend, *case)
        for backend in ("cpp", "triton")
        for case in EVERYTHING
        if case[0] in ((2, 64, 7, 5), (3, 6, 9, 1), (2, 8, 63), (4, 12))
    ),
    *(("emulated", *case) for case in EMULATED),
    *(pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in EVERYTHING),
]
EMULATED_DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # cat_fast::group_norm_silu::Dtype
EMULATED_CHUNK = 2048  # elements; smaller than kCudaChunkElements, so that small tensors have several chunks


@pytest.fixture(params=BACKENDS)
def backend(request, force, monkeypatch):
    """Force each backend of this machine; the emulated CUDA kernels need no forcing."""
    if request.param != "emulated":
        force("group_norm_silu", request.param)
    if request.param == "triton":  # few programs, which then walk over several tiles each
        monkeypatch.setattr("cat_fast.kernels.group_norm_silu.triton.multiprocessors", lambda x: 1)
    return request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"


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
def emulation(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / "group_norm_silu.so"
    compile_emulation("group_norm_silu", path, "-shared", "-fPIC")
    library = ctypes.CDLL(str(path))
    library.workspace_floats.restype = ctypes.c_int64
    return library


@pytest.fixture
def results(request, backend):
    """Return a function that computes y, dx, dweight, dbias and, with input_bias, dinput_bias."""
    if backend != "emulated":
        return lambda x, weight, bias, grad, *arguments, input_bias=(): value_and_gradients(
            lambda x, weight, bias, *input_bias: group_norm_silu(x, weight, bias, *arguments, *input_bias),
            *(x, weight, bias, *input_bias, grad),
        )
    library = request.getfixturevalue("emulation")
    return lambda *arguments, **input_bias: run_emulated(library, *arguments, **input_bias)


def run_emulated(library, x, weight, bias, grad, groups, eps, activation, input_bias=()):
    """Return the results of the emulated CUDA kernels, whose outputs are initialized with NaN."""
    channels_last = not x.is_contiguous()
    if channels_last:
        grad = grad.contiguous(memory_format=torch.channels_last)
    spatial = x[0, 0].numel()
    chunk = max(1, EMULATED_CHUNK // x.shape[1]) if channels_last else EMULATED_CHUNK
    shape = Shape(x.shape[0], x.shape[1], spatial, groups, channels_last, chunk, -(-spatial // chunk))
    nan = float("nan")
    y, dx = torch.full_like(x, nan), torch.full_like(x, nan)
    center = torch.full((x.shape[0], x.shape[1] if input_bias else groups), nan)
    rstd = torch.full((x.shape[0], groups), nan)
    dweight, dbias, *dinput_bias = torch.full((2 + len(input_bias), x.shape[1]), nan).unbind()
    deviation = [torch.full(x.shape[:2], nan) for _ in input_bias]
    workspace = torch.full((library.workspace_floats(ctypes.byref(shape)),), nan)
    scratch = pointer(workspace)
    flag, dtype = ctypes.c_int(activation), ctypes.c_int(EMULATED_DTYPES.index(x.dtype))
    parameters = pointer(weight), pointer(bias)
    statistics = pointer(center), pointer(rstd), *(map(pointer, deviation) if deviation else [None])
    gradients = *map(pointer, (dx, dweight, dbias)), *(map(pointer, dinput_bias) if dinput_bias else [None])
    first = dtype, ctypes.byref(shape)
    library.forward(
        *(*first, pointer(x), *parameters, *(map(pointer, input_bias) if input_bias else [None])),
        *(ctypes.c_float(eps), flag, pointer(y), *statistics, scratch),
    )
    workspace.fill_(nan)
    library.backward(
        *first,
        pointer(grad),
        pointer(x),
        *parameters,
        *statistics,
        flag,
        *gradients,
        scratch,
    )
    return y, dx, dweight, dbias, *dinput_bias


def inputs(shape, *, device, dtype=torch.float32, channels_last=False, mean=0.5):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + mean).to(dtype)
    if channels_last:
        x = x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    grad = torch.randn(shape).to(dtype)
    return [t.to(device) for t in (x, weight, bias, grad)]


def value_and_gradients(function, *tensors):
    *leaves, grad = tensors
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def float64_truth(x, weight, bias, grad, groups, eps, activation, input_bias=()):
    per_channel = (1, -1, *[1] * (x.dim() - 2))

    def formula(x, weight, bias, *input_bias):
        x = sum((added.view(per_channel) for added in input_bias), x)
        grouped = x.reshape(x.shape[0], groups, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        z = (centred / (variance + eps).sqrt()).view_as(x) * weight.view(per_channel) + bias.view(per_channel)
        return z * torch.sigmoid(z) if activation else z

    doubles = [t.double().contiguous() for t in (x, weight, bias, *input_bias, grad)]
    return value_and_gradients(formula, *doubles)


@pytest.mark.parametrize(
    ("backend", "shape", "groups", "channels_last", "dtype", "activation"),
    CASES,
    indirect=["backend"],
    ids=str,
)
def test_value_and_gradients_match_float64(
    results, backend, device, shape, groups, channels_last, dtype, activation
):
    if device == "cpu" and backend == "triton" and math.prod(shape) > 100_000:
        pytest.skip("takes minutes in Triton's interpreter")
    tensors = inputs(shape, device=device, dtype=dtype, channels_last=channels_last)
    got = results(*tensors, groups, 1e-5, activation)
    want = float64_truth(*tensors, groups, 1e-5, activation)
    for name, ours, truth in zip(("y", "dx", "dweight", "dbias"), got, want, strict=True):
        error = (ours.double() - truth).abs().max() / truth.abs().max()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"  # also fails for NaN
    assert got[0].stride() == tensors[0].stride()
    assert got[1].stride() == tensors[0].stride()


@pytest.mark.parametrize(
    ("backend", "shape", "groups", "channels_last", "dtype", "activation"),
    WITH_INPUT_BIAS,
    indirect=["backend"],
    ids=str,
)
def test_input_bias_is_added_to_the_input(results, device, shape, groups, channels_last, dtype, activation):
    tensors = inputs(shape, device=device, dtype=dtype, channels_last=channels_last)
    input_bias = [(torch.randn(shape[1]) * 3 - 1).to(device)]
    got = results(*tensors, groups, 1e-5, activation, input_bias=input_bias)
    want = float64_truth(*tensors, groups, 1e-5, activation, input_bias)
    for name, ours, truth in zip(("y", "dx", "dweight", "dbias", "dinput_bias"), got, want, strict=True):
        error = (ours.double() - truth).abs().max() / truth.abs().max()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"
    assert [t.dtype for t in got] == [dtype, dtype, *[torch.float32] * 3]
    assert got[0].stride() == tensors[0].stride()


def test_a_mean_far_from_zero_does_not_cancel(device):
    x, weight, bias, grad = inputs((2, 8, 33, 17), device=device, mean=1e4)
    got = group_norm_silu(x, weight, bias, 4, 1e-5)
    assert_close(got.double(), float64_truth(x, weight, bias, grad, 4, 1e-5, True)[0], atol=5e-3, rtol=0)


@pytest.mark.parametrize("value", [1e30, 90.0, 88.0, 0.0, -1e-30, -86.0, -100.0, -1e30])
def test_activation_is_correct_over_the_full_range(device, value):
    bias = torch.full((1,), value, device=device)
    got = group_norm_silu(torch.zeros(1, 1, 40, device=device), torch.ones_like(bias), bias, 1, 1e-5)
    assert_close(
        got, F.silu(bias.double()).float().expand(1, 1, 40), atol=1e-7 + 1e-37 * abs(value), rtol=1e-6
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_value_propagates(device, value):
    x = torch.zeros(1, 2, 100, device=device)
    x[0, 1, 7] = value
    parameters = torch.ones(2, device=device), torch.zeros(2, device=device)
    got = group_norm_silu(x, *parameters, 2, 1e-5)
    assert got[0, 0].isfinite().all()
    assert got[0, 1].isnan().all()
    assert group_norm_silu(x.bfloat16(), *parameters, 2, 1e-5)[0, 1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_an_empty_batch_gives_empty_output_and_zero_gradients(device, shape, biased):
    x, weight, bias, grad = inputs(shape, device=device)
    y, dx, *gradients = value_and_gradients(
        lambda x, w, b, *input_bias: group_norm_silu(x, w, b, 2, 1e-5, True, *input_bias),
        *(x, weight, bias, *[bias] * biased, grad),
    )
    assert y.shape == dx.shape == shape
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


def test_gradients_may_arrive_in_another_memory_format_and_input_as_a_view(device):
    x, weight, bias, grad = inputs((2, 16, 9, 11), device=device, channels_last=True)
    assert grad.is_contiguous()
    want = float64_truth(x, weight, bias, grad, 4, 1e-5, True)
    view = torch.cat([x, x], dim=3)[..., :11]  # neither contiguous nor channels-last
    for x_given in (x, view):
        got = value_and_gradients(lambda *t: group_norm_silu(*t, 4, 1e-5), x_given, weight, bias, grad)
        for ours, truth in zip(got, want, strict=True):
            assert_close(ours.double(), truth, atol=2e-4, rtol=1e-4)


def test_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "cpp")
    x, weight, bias, grad = inputs((2, 12, 211, 199), device="cpu", channels_last=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                value_and_gradients(lambda *t: group_norm_silu(*t, 4, 1e-5), x, weight, bias, grad)
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_does_not_read_uninitialized_memory(device):
    """Allocations are filled with NaN, which exposes outputs and partial sums that are not written."""
    x, weight, bias, grad = inputs((2, 12, 37, 41), device=device)
    tensors = x, weight, bias, bias + 1, grad

    def run(x, weight, bias, input_bias):
        return group_norm_silu(x, weight, bias, 3, 1e-5, input_bias=input_bias)

    plain = value_and_gradients(run, *tensors)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        poisoned = value_and_gradients(run, *tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_operator_is_registered_as_torch_expects(backend, device, channels_last):
    x, weight, bias, _ = inputs((2, 8, 5, 3), device=device, channels_last=channels_last)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    suffix = "_triton" if backend == "triton" else ""
    forward = getattr(torch.ops.cat_fast, f"group_norm_silu{suffix}").default
    backward = getattr(torch.ops.cat_fast, f"group_norm_silu_backward{suffix}").default
    torch.library.opcheck(forward, (*leaves, 4, 1e-5, True))
    torch.library.opcheck(
        backward,
        (*[t.detach() for t in (x, x, weight, bias)], *torch.ones(2, 2, 4, device=device).unbind(), 4, True),
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_operator_with_an_input_bias_is_registered_as_torch_expects(backend, device, channels_last):
    if backend == "cpp":
        pytest.skip("CPUs add the bias in a pass of its own")
    x, weight, bias, _ = inputs((2, 8, 5, 3), device=device, channels_last=channels_last)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, bias)]
    suffix = "_triton" if backend == "triton" else ""
    forward = getattr(torch.ops.cat_fast, f"group_norm_silu_biased{suffix}").default
    backward = getattr(torch.ops.cat_fast, f"group_norm_silu_biased_backward{suffix}").default
    torch.library.opcheck(forward, (*leaves, 4, 1e-5, True))
    center, deviation = torch.zeros(2, 2, 8, device=device).unbind()
    statistics = center, torch.ones(2, 4, device=device), deviation
    torch.library.opcheck(backward, (x, *[t.detach() for t in leaves], *statistics, 4, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_of_the_input(device, dtype):
    x, weight, bias, grad = inputs((2, 8, 5, 3), device=device, dtype=dtype)
    plain = group_norm_silu(x, weight, bias, 4, 1e-5)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = value_and_gradients(lambda *t: group_norm_silu(*t, 4, 1e-5), x, weight, bias, grad)
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.float32]
    assert torch.equal(got[0], plain)


def test_compiles_without_a_graph_break(device):
    x, weight, bias, _ = inputs((2, 8, 5, 3), device=device)

    def run(x, input_bias=None):
        return group_norm_silu(x, weight, bias, 4, 1e-5, input_bias=input_bias)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), run(x))
    assert_close(compiled(x, bias), run(x, bias))


def test_tensors_that_no_compiled_backend_accepts_run_on_the_reference(monkeypatch):
    monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
    x, weight, bias, _ = inputs((2, 8, 5), device="cpu")
    got = group_norm_silu(x.double(), weight.double(), bias.double(), 4, 1e-5)
    assert torch.equal(got, group_norm_silu_reference(x.double(), weight.double(), bias.double(), 4, 1e-5))


def test_a_forced_backend_names_the_violated_constraint(monkeypatch):
    x, weight, bias, _ = inputs((2, 8, 5), device="cpu")
    monkeypatch.setenv("CAT_FAST_BACKEND", "cuda")
    with pytest.raises(
        UserError, match=r"CAT_FAST_BACKEND=cuda: group_norm_silu .* expected cuda tensors, got cpu"
    ):
        group_norm_silu(x, weight, bias, 4, 1e-5)
    monkeypatch.setenv("CAT_FAST_BACKEND", "cpp")
    with pytest.raises(UserError, match=r"expected .*float32 .*bfloat16 .*float16, got"):
        group_norm_silu(x.double(), weight, bias, 4, 1e-5)
    monkeypatch.setenv("CAT_FAST_BACKEND", "fortran")
    with pytest.raises(UserError, match="unknown"):
        group_norm_silu(x, weight, bias, 4, 1e-5)


@pytest.mark.parametrize("activation", [True, False])
def test_reference_passes_gradcheck(activation):
    x, weight, bias, _ = (t.double().requires_grad_() for t in inputs((2, 6, 3, 2), device="cpu"))
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, *input_bias: group_norm_silu_reference(
            x, weight, bias, 3, 1e-5, activation, *input_bias
        ),
        (x, weight, bias, bias.detach().clone().requires_grad_()),
    )


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "with a missing __syncthreads"])
def test_cuda_kernels_have_no_data_race(tmp_path, planted):
    write_then_sync = "shared[threadIdx.x * V + j] = sums[j];\n  __syncthreads();"
    check_races(
        "group_norm_silu", tmp_path, "group_norm_silu/kernels.cuh", write_then_sync if planted else None
    )
