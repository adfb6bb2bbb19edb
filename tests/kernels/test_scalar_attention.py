"""scalar_attention: every backend of this machine against the formula in float64, forward and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.errors import UserError
from cat_fast.kernels.scalar_attention.op import scalar_attention
from cat_fast.kernels.scalar_attention.reference import scalar_attention_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
NAMES = ("y", "dq", "dk", "dv")


@pytest.fixture
def compiled(require):
    """Skips where there is no compiled backend, so that the reference is not compared with itself."""
    require("scalar_attention", "cpp")


def inputs(shape, *, deviation=1.0, mean=0.0, dtype=torch.float32):
    """q, k, v and the gradient at y."""
    q, k, v, grad = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    return [t.to(dtype) for t in (q * deviation + mean, k * deviation - mean, v + mean, grad)]


def formula(q, k, v):
    weights = torch.einsum("bih,bjh->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bjh->bih", weights, v)


def value_and_gradients(function, q, k, v, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def assert_matches_float64(tensors, got=None):
    got = value_and_gradients(scalar_attention, *tensors) if got is None else got
    want = value_and_gradients(formula, *(t.double() for t in tensors))
    for name, ours, truth in zip(NAMES, got, want, strict=True):
        assert ours.dtype == tensors[0].dtype
        scale = truth.abs().max().clamp(min=0.1)  # gradients of saturated weights are zero but for rounding
        assert_close(
            ours.double() / scale,
            truth / scale,
            atol=TOLERANCE[ours.dtype],
            rtol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# One position, few, odd numbers, full groups of sixteen heads and parts of one; from nearly uniform weights
# (one block), over tables of many blocks, to ranges that only the direct sum takes.
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", [(2, 1, 3), (1, 2, 1), (2, 63, 35), (1, 1000, 16)], ids=str)
def test_value_and_gradients_match_float64(shape, deviation, dtype):
    assert_matches_float64(inputs(shape, deviation=deviation, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 63, 35), (1, 1000, 16)], ids=str)
def test_value_and_gradients_match_float64_on_a_gpu(shape, deviation, dtype):
    assert_matches_float64([t.cuda() for t in inputs(shape, deviation=deviation, dtype=dtype)])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("method", ["by table", "directly"])
def test_both_methods_give_the_same_within_one_tensor(method):
    """Heads choose for themselves: one head with a wide range leaves the others' results as they were."""
    q, k, v, grad = inputs((1, 200, 4))
    if method == "directly":
        q[:, :, 1] *= 100
    assert_matches_float64((q, k, v, grad))
    got = scalar_attention(q, k, v)
    alone = scalar_attention(*(t[:, :, 2:3] for t in (q, k, v)))
    assert torch.equal(got[:, :, 2:3], alone)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("mean", [-5.0, 10.0])
def test_queries_keys_and_values_may_lie_far_from_zero(mean):
    assert_matches_float64(inputs((1, 500, 4), mean=mean, deviation=0.5))


@pytest.mark.usefixtures("compiled")
def test_exponents_far_beyond_the_range_of_floats_neither_overflow_nor_vanish():
    q, k, v, _ = inputs((1, 1000, 2), deviation=30.0)
    assert (q.amax() * k.amax()).exp().isinf()
    want = formula(q.double(), k.double(), v.double())
    assert_close(scalar_attention(q, k, v).double(), want, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("constant", ["q", "k", "v"])
def test_a_range_of_zero_is_no_special_case(constant):
    tensors = dict(zip(("q", "k", "v", "grad"), inputs((2, 100, 3)), strict=True))
    tensors[constant] = torch.full_like(tensors[constant], 0.75)
    q, k, v, grad = tensors.values()
    got = value_and_gradients(scalar_attention, q, k, v, grad)
    want = value_and_gradients(formula, q.double(), k.double(), v.double(), grad.double())
    for ours, truth in zip(got, want, strict=True):
        assert_close(ours.double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["q", "k", "v"])
def test_a_value_that_is_not_finite_is_not_hidden_and_stays_in_its_head(where, value):
    tensors = inputs((2, 100, 3))
    tensors[where][1, 7, 2] = value
    for result in value_and_gradients(scalar_attention, *tensors):
        assert result[1, :, 2].isnan().all()
        assert result[0].isfinite().all()
        assert result[1, :, :2].isfinite().all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_input_gives_empty_output_and_gradients(shape):
    for result in value_and_gradients(scalar_attention, *inputs(shape)):
        assert result.shape == shape


@pytest.mark.usefixtures("compiled")
def test_inputs_and_gradients_may_be_views_in_another_memory_order():
    tensors = inputs((2, 70, 12))
    want = value_and_gradients(scalar_attention, *tensors)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    views[0] = torch.cat([tensors[0], tensors[0]], dim=2)[:, :, :12]
    got = [scalar_attention(*views[:3]), *torch.ops.cat_fast.scalar_attention_backward(views[3], *views[:3])]
    for ours, contiguous in zip(got, want, strict=True):
        assert torch.equal(ours, contiguous)


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
@pytest.mark.parametrize("deviation", [1.0, 9.0])
def test_reads_no_memory_it_did_not_write(deviation):
    """With NaN in every fresh allocation, an unwritten output shows."""
    tensors = inputs((2, 67, 13), deviation=deviation)
    plain = value_and_gradients(scalar_attention, *tensors)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        poisoned = value_and_gradients(scalar_attention, *tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@pytest.mark.usefixtures("compiled")
def test_operator_is_registered_as_torch_expects():
    q, k, v, grad = inputs((2, 9, 5))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.cat_fast.scalar_attention.default, tuple(leaves))
    torch.library.opcheck(
        torch.ops.cat_fast.scalar_attention_backward.default, (grad, *(t.detach() for t in leaves))
    )


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


def test_what_no_compiled_backend_takes_runs_on_the_reference(monkeypatch):
    monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
    q, k, v, _ = (t.double() for t in inputs((2, 6, 3)))
    assert torch.equal(scalar_attention(q, k, v), scalar_attention_reference(q, k, v))


def test_a_forced_backend_names_the_constraint_it_fails(monkeypatch):
    q, k, v, _ = inputs((2, 6, 3))
    monkeypatch.setenv("CAT_FAST_BACKEND", "cuda")
    with pytest.raises(UserError, match="scalar_attention cannot run there: it takes cuda tensors, not cpu"):
        scalar_attention(q, k, v)
    monkeypatch.setenv("CAT_FAST_BACKEND", "cpp")
    with pytest.raises(UserError, match=r"scalar_attention cannot run there: .*float64"):
        scalar_attention(q.double(), k.double(), v.double())


def test_shapes_and_dtypes_that_differ_are_refused():
    q, k, v, _ = inputs((2, 6, 3))
    with pytest.raises(ValueError, match=r"one shape \(B, N, H\).*\(2, 5, 3\)"):
        scalar_attention(q, k[:, :5], v)
    with pytest.raises(ValueError, match="bfloat16"):
        scalar_attention(q, k, v.bfloat16())
