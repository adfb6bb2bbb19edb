"""scalar_attention: every backend of this machine against the formula in float64, forward and gradients.

The CUDA kernels are also executed on CPU threads (csrc/emulation), which needs no GPU.
"""

import ctypes
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.errors import UserError
from cat_fast.kernels.scalar_attention.op import scalar_attention
from cat_fast.kernels.scalar_attention.reference import scalar_attention_reference
from tests.kernels.emulation import check_races, compile_emulation, pointer
from tests.session import runs_triton, triton_is_compiled

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # keys in the order of Dtype
NAMES = ("y", "dq", "dk", "dv")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning"
)  # from Triton's interpreter, at masked positions


@pytest.fixture
def compiled(require):
    """Skip without a compiled backend, so that the reference is not compared with itself."""
    require("scalar_attention", "cpp")


@pytest.fixture(params=["cpp", "triton", CUDA])
def backend(request, force):
    """Force each backend of this machine; the emulated CUDA kernels need no forcing."""
    if request.param != "emulated":
        force("scalar_attention", request.param)
    return request.param


@pytest.fixture
def device(backend):
    on_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return "cuda" if on_gpu else "cpu"


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    return load_emulation(tmp_path_factory.mktemp("emulation"))


def load_emulation(folder, *flags):
    path = folder / "scalar_attention.so"
    compile_emulation("scalar_attention", path, "-shared", "-fPIC", *flags)
    library = ctypes.CDLL(str(path))
    library.workspace_floats.restype = ctypes.c_int64
    return library


@pytest.fixture
def results(request, backend):
    """Return a function that computes y, dq, dk, dv from q, k, v and the gradient of y."""
    if backend != "emulated":
        return lambda *tensors: value_and_gradients(scalar_attention, *tensors)
    library = request.getfixturevalue("emulation")
    return lambda *tensors: run_emulated(library, *tensors)


def run_emulated(library, q, k, v, grad):
    """Run the CUDA kernels in emulation, with outputs initialized with NaN."""
    q, k, v, grad = (t.contiguous() for t in (q, k, v, grad))
    sizes = (ctypes.c_int64 * 3)(*q.shape)
    dtype = ctypes.c_int([*TOLERANCE].index(q.dtype))
    y, dq, dk, dv = torch.full((4, *q.shape), float("nan"), dtype=q.dtype).unbind()
    calls = (library.forward, (q, k, v, y)), (library.backward, (grad, q, k, v, dq, dk, dv))
    for function, tensors in calls:
        size = library.workspace_floats(sizes, ctypes.c_int(function is library.backward))
        workspace = torch.full((size,), float("nan"))
        function(dtype, sizes, *map(pointer, tensors), pointer(workspace))
    return y, dq, dk, dv


def inputs(shape, *, deviation=1.0, dtype=torch.float32, device="cpu"):
    """Return q, k, v and the gradient of y."""
    q, k, v, grad = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    return [t.to(device, dtype) for t in (q * deviation, k * deviation, v, grad)]


def formula(q, k, v):
    weights = torch.einsum("bih,bjh->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bjh->bih", weights, v)


def value_and_gradients(function, q, k, v, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def assert_matches_float64(tensors, got):
    want = value_and_gradients(formula, *(t.double() for t in tensors))
    for name, ours, truth in zip(NAMES, got, want, strict=True):
        assert ours.dtype == tensors[0].dtype
        assert ours.is_contiguous()
        scale = truth.abs().max().clamp(min=0.1)  # gradients of saturated weights are zero up to rounding
        error = (ours.double() - truth).abs().max() / scale
        assert error <= TOLERANCE[ours.dtype], f"{name}: {error:.1e}"  # also fails for NaN


# One position, few, odd numbers, full and partial groups of sixteen heads; nearly uniform weights (one
# block), tables of many blocks, and ranges that only the direct sum handles.
EVERYTHING = list(
    product([(2, 1, 3), (1, 2, 1), (2, 63, 35), (1, 1000, 16)], [0.3, 1.0, 2.0, 4.0], TOLERANCE)
)
# Less and more than one tile of heads, aligned and not; several splits.
INTERPRETED = [
    ((2, 1, 3), 1.0, torch.float32),
    ((1, 63, 1), 1.0, torch.float32),
    ((1, 150, 24), 1.0, torch.float32),
    ((2, 100, 5), 1.0, torch.bfloat16),
    ((2, 100, 5), 1.0, torch.float16),
    ((1, 1000, 1), 1.0, torch.float32),
]
# One chunk and several, less and more than one group of heads; more blocks than a warp has lanes, and more
# than the capacity.
EMULATED = [
    ((2, 1, 3), 1.0, torch.float32),
    ((1, 2, 1), 1.0, torch.float32),
    ((2, 63, 11), 0.3, torch.float32),
    ((1, 300, 9), 1.0, torch.float32),
    ((1, 200, 2), 2.5, torch.float32),
    ((1, 70, 3), 9.0, torch.float32),
    ((1, 63, 11), 1.0, torch.bfloat16),
    ((1, 63, 11), 1.0, torch.float16),
]
CASES = [
    *(("cpp", *case) for case in EVERYTHING),
    *(("triton", *case) for case in INTERPRETED),
    *(("emulated", *case) for case in EMULATED),
    *(pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in EVERYTHING),
]
WITH_EMULATION = pytest.mark.parametrize("backend", ["cpp", "triton", "emulated", CUDA], indirect=True)


@pytest.mark.parametrize(("backend", "shape", "deviation", "dtype"), CASES, indirect=["backend"], ids=str)
def test_value_and_gradients_match_float64(results, device, shape, deviation, dtype):
    tensors = inputs(shape, deviation=deviation, dtype=dtype, device=device)
    assert_matches_float64(tensors, results(*tensors))


@pytest.mark.parametrize(
    ("backend", "positions", "deviation", "factor"),
    [
        ("cpp", 200, 1.0, 100),
        ("triton", 200, 0.5, 100),
        ("emulated", 70, 1.0, 10),
        pytest.param("cuda", 200, 1.0, 100, marks=pytest.mark.gpu),
    ],
    indirect=["backend"],
)
def test_heads_summed_directly_and_by_table_share_a_tensor(
    results, backend, device, positions, deviation, factor
):
    """Each head chooses independently: one head with a wide range does not change the others' results."""
    tensors = inputs((1, positions, 4), deviation=deviation, device=device)
    tensors[0][:, :, 1] *= factor
    got = results(*tensors)
    assert_matches_float64(tensors, got)
    for head in range(4) if backend == "emulated" else (0, 2, 3):
        own = [t[:, :, head : head + 1].contiguous() for t in tensors]
        assert_matches_float64(own, [ours[:, :, head : head + 1].contiguous() for ours in got])
    alone = results(*(t[:, :, 2:3] for t in tensors))
    tolerance = 1e-6 if backend == "emulated" else 0.0
    for ours, single in zip(got, alone, strict=True):
        assert_close(ours[:, :, 2:3], single, rtol=0, atol=tolerance)


@runs_triton
@pytest.mark.parametrize("deviation", [0.3, 1.0, 1.5])
def test_tables_of_few_and_of_many_blocks_are_correct(force, deviation):
    force("scalar_attention", "triton")
    from cat_fast.kernels.scalar_attention.triton_sums import AT_KEYS, AT_QUERIES, COUNT, parameters_of

    tensors = inputs((1, 300, 4), deviation=deviation, device="cuda" if triton_is_compiled() else "cpu")

    def blocks():
        parameters = parameters_of(*tensors[:3])
        return [parameters[:, at.value + COUNT.value] for at in (AT_QUERIES, AT_KEYS)]

    assert all((count >= max(1.0, 6.0 * deviation**2)).all() for count in blocks())
    assert_matches_float64(tensors, value_and_gradients(scalar_attention, *tensors))
    tensors[0][:, :, 1] *= 10 / deviation**2  # past the largest table
    assert all((count == 0).tolist() == [[False, True, False, False]] for count in blocks())


@pytest.mark.parametrize("offsets", [(20.0, 0, 0), (0, -1000.0, 0), (0, 0, 100.0)], ids=str)
def test_queries_keys_and_values_may_be_far_from_zero(results, device, offsets):
    tensors = inputs((1, 200, 3), deviation=0.5, device=device)
    for tensor, offset in zip(tensors, offsets, strict=False):
        tensor += offset
    assert_matches_float64(tensors, results(*tensors))


@pytest.mark.parametrize("backend", ["cpp", CUDA], indirect=True)
@pytest.mark.parametrize("mean", [-5.0, 10.0])
def test_queries_keys_and_values_may_be_far_from_zero_together(results, device, mean):
    tensors = inputs((1, 500, 4), deviation=0.5, device=device)
    for tensor, sign in zip(tensors, (1, -1, 1), strict=False):
        tensor += sign * mean
    assert_matches_float64(tensors, results(*tensors))


def test_exponents_far_beyond_the_range_of_floats_neither_overflow_nor_vanish(results, device):
    q, k, v, grad = inputs((1, 100, 2), deviation=30.0, device=device)
    assert (q.amax() * k.amax()).exp().isinf()
    want = formula(q.double(), k.double(), v.double())
    assert_close(results(q, k, v, grad)[0].double(), want, rtol=0, atol=1e-4)


@WITH_EMULATION
@pytest.mark.parametrize("size", [1e-44, 1e-39, 3e-38, 1e-31, 1e-29])
@pytest.mark.parametrize("tiny", [(0,), (1,), (0, 1)], ids=["q", "k", "q and k"])
def test_tiny_and_denormal_queries_and_keys(results, device, tiny, size):
    """The reciprocal of a block's width overflows if positions are denormal."""
    tensors = inputs((1, 40, 3), device=device)
    for index in tiny:
        tensors[index] *= size
    assert_matches_float64(tensors, results(*tensors))


@pytest.mark.parametrize("constant", [0, 1, 2], ids=["q", "k", "v"])
def test_a_range_of_zero_is_no_special_case(results, device, constant):
    tensors = inputs((2, 70, 3), device=device)
    tensors[constant].fill_(0.75)
    assert_matches_float64(tensors, results(*tensors))


@WITH_EMULATION
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", range(4), ids=["q", "k", "v", "grad"])
def test_a_non_finite_value_propagates_within_its_head_only(results, device, where, value):
    tensors = inputs((2, 40, 3), device=device)
    tensors[where][1, 7, 2] = value
    for result in results(*tensors)[where // 3 :]:  # y does not depend on the incoming gradient
        assert result[1, :, 2].isnan().all()
        assert result[0].isfinite().all()
        assert result[1, :, :2].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_input_gives_empty_output_and_gradients(results, device, shape):
    for result in results(*inputs(shape, device=device)):
        assert result.shape == shape


def operators(backend):
    """Return the forward and backward operators of a backend."""
    suffix = "_triton" if backend == "triton" else ""
    names = (f"scalar_attention{suffix}", f"scalar_attention_backward{suffix}")
    return [getattr(torch.ops.cat_fast, name).default for name in names]


def test_inputs_and_gradients_may_be_views_in_another_memory_order(results, backend, device):
    tensors = inputs((2, 40, 12), device=device)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    views[0] = torch.cat([tensors[0], tensors[0]], dim=2)[:, :, :12]
    forward, backward = operators(backend)
    got = [forward(*views[:3]), *backward(views[3], *views[:3])]
    for ours, contiguous in zip(got, results(*tensors), strict=True):
        assert torch.equal(ours, contiguous)


@pytest.mark.parametrize("deviation", [1.0, 9.0])
def test_does_not_read_uninitialized_memory(results, device, deviation):
    """Allocations are filled with NaN, which exposes outputs that are not written."""
    tensors = inputs((2, 67, 19), deviation=deviation, device=device)
    plain = results(*tensors)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        poisoned = results(*tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


def test_operator_is_registered_as_torch_expects(backend, device):
    q, k, v, grad = inputs((2, 9, 5), device=device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    forward, backward = operators(backend)
    torch.library.opcheck(forward, tuple(leaves))
    torch.library.opcheck(backward, (grad, *(t.detach() for t in leaves)))


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 8, 64, 1000])
def test_the_scratch_memory_of_cuda_is_bounded(emulation, samples):
    """At the positions and heads of an 8x latent of 512 px, one sample of which fits."""
    sizes = (ctypes.c_int64 * 3)(samples, 4096, 512)
    for backward in (0, 1):
        assert 0 < 4 * emulation.workspace_floats(sizes, ctypes.c_int(backward)) <= 128 << 20


def test_samples_in_passes_have_the_results_of_samples_alone(tmp_path):
    """With scratch memory for two of three samples, the second pass is a partial one."""
    tensors = inputs((3, 40, 3))
    scratch = 4 * load_emulation(tmp_path).workspace_floats((ctypes.c_int64 * 3)(2, 40, 3), ctypes.c_int(1))
    (tmp_path / "bounded").mkdir()
    bounded = load_emulation(tmp_path / "bounded", f"-DCAT_FAST_SCRATCH_BYTES={scratch}")
    sizes = (ctypes.c_int64 * 3)(3, 40, 3)
    assert 4 * bounded.workspace_floats(sizes, ctypes.c_int(1)) <= scratch
    assert_matches_float64(tensors, run_emulated(bounded, *tensors))


@runs_triton
def test_samples_in_passes_of_triton(force, monkeypatch):
    force("scalar_attention", "triton")
    from cat_fast.kernels.scalar_attention import triton

    tensors = inputs((3, 63, 3), device="cuda" if triton_is_compiled() else "cpu")
    sizes, split = [], torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda x, n: sizes.append(n) or split(x, n))
    monkeypatch.setattr(triton, "SCRATCH_BYTES", 2 * (4 * 3 * 7 * 4 * 8 + 2 * 4 * 63 * 3))
    assert_matches_float64(tensors, value_and_gradients(scalar_attention, *tensors))
    assert sizes == [6] * 4 + [2] * 7  # the forward pass needs less


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "with a missing __syncthreads"])
def test_cuda_kernels_have_no_data_race(tmp_path, planted):
    write_then_sync = "rows[threadIdx.x] = range;\n  __syncthreads();"
    planted_in = write_then_sync if planted else None
    check_races("scalar_attention", tmp_path, "scalar_attention/plan.cuh", planted_in)


@pytest.mark.usefixtures("compiled")
def test_result_does_not_depend_on_the_number_of_threads():
    tensors = inputs((2, 301, 20))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(scalar_attention, *tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("compiled")
def test_compiles_without_a_graph_break():
    q, k, v, _ = inputs((2, 9, 5))
    compiled = torch.compile(scalar_attention, backend="aot_eager", fullgraph=True)
    assert_close(compiled(q, k, v), scalar_attention(q, k, v))


@pytest.mark.usefixtures("compiled")
def test_counts_the_operations_of_attention():
    q, k, v, grad = inputs((2, 9, 5))
    with FlopCounterMode(display=False) as counter:
        value_and_gradients(scalar_attention, q, k, v, grad)
    assert counter.get_total_flops() == (4 + 10) * 2 * 5 * 9**2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_it_in_the_autocast_dtype_as_torchs_attention(dtype):
    q, k, v, grad = inputs((2, 40, 3))
    leaves = [q.requires_grad_(), k.to(dtype).requires_grad_(), v.requires_grad_()]
    with torch.autocast("cpu", dtype=dtype):
        y = scalar_attention(*leaves)
        heads = (t.transpose(1, 2).unsqueeze(-1) for t in leaves)
        torchs = F.scaled_dot_product_attention(*heads, scale=1.0).squeeze(-1).transpose(1, 2)
    assert y.dtype == torchs.dtype == dtype
    assert_close(y, scalar_attention(*(t.to(dtype) for t in leaves)))
    gradients = torch.autograd.grad(y, leaves, grad.to(dtype))
    assert [t.dtype for t in gradients] == [t.dtype for t in leaves]


def test_autocast_leaves_float64_alone():
    q, k, v, _ = (t.double() for t in inputs((2, 6, 3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scalar_attention(q, k, v), scalar_attention_reference(q, k, v))


def test_reference_is_the_formula_and_passes_gradcheck():
    q, k, v, _ = (t.double() for t in inputs((2, 6, 3)))
    assert_close(scalar_attention_reference(q, k, v), formula(q, k, v))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(scalar_attention_reference, leaves)


def test_tensors_that_no_compiled_backend_accepts_run_on_the_reference(monkeypatch):
    monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
    q, k, v, _ = (t.double() for t in inputs((2, 6, 3)))
    assert torch.equal(scalar_attention(q, k, v), scalar_attention_reference(q, k, v))


def test_a_forced_backend_names_the_violated_constraint(monkeypatch):
    q, k, v, _ = inputs((2, 6, 3))
    monkeypatch.setenv("CAT_FAST_BACKEND", "cuda")
    with pytest.raises(UserError, match=r"scalar_attention cannot run .*: expected cuda tensors, got cpu"):
        scalar_attention(q, k, v)
    monkeypatch.setenv("CAT_FAST_BACKEND", "cpp")
    with pytest.raises(UserError, match=r"scalar_attention cannot run .*: .*float64"):
        scalar_attention(q.double(), k.double(), v.double())


def test_shapes_and_dtypes_that_differ_are_refused():
    q, k, v, _ = inputs((2, 6, 3))
    with pytest.raises(ValueError, match=r"one shape \(B, N, H\).*\(2, 5, 3\)"):
        scalar_attention(q, k[:, :5], v)
    with pytest.raises(ValueError, match="bfloat16"):
        scalar_attention(q, k, v.bfloat16())
