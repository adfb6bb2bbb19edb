"""wide_attention: the reference and the Triton kernels, interpreted or on a GPU, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cat_fast.errors import UserError
from cat_fast.kernels import backends
from cat_fast.kernels.wide_attention.op import wide_attention
from cat_fast.kernels.wide_attention.reference import wide_attention_reference
from cat_fast.tokenizer.blocks import Attention

BACKENDS = [
    ("cpu", "reference"),
    ("cpu", "triton"),
    pytest.param(("cuda", "reference"), marks=pytest.mark.gpu),
    pytest.param(("cuda", "triton"), marks=pytest.mark.gpu),
]
# (B, N, H, D): one position, several heads, less than a tile, more than one, slices that overlap.
FULL = [(2, 1, 1, 512), (1, 17, 2, 320), (1, 33, 1, 256)]
HALF = [(2, 1, 1, 256), (1, 16, 2, 384), (1, 63, 1, 512), (1, 80, 1, 256)]
CASES = [
    *((shape, torch.float32) for shape in FULL),
    *((shape, dtype) for dtype in (torch.bfloat16, torch.float16) for shape in HALF),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture(params=BACKENDS, ids="-".join)
def device(request, monkeypatch):
    """Force one backend and return its device."""
    device, backend = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if backend == "triton":
        interpreted = backends.triton_is_interpreted()
        if backends.triton_unavailable_reason() is not None or interpreted != (device == "cpu"):
            pytest.skip("Triton's interpreter runs CPU tensors, its compiler CUDA tensors")
    monkeypatch.setenv("CAT_FAST_BACKEND", f"wide_attention={backend}")
    return device


@pytest.fixture
def triton(monkeypatch):
    """Force the Triton kernels and return their device."""
    if backends.triton_unavailable_reason() is not None:
        pytest.skip("needs Triton, and a GPU or its interpreter")
    monkeypatch.setenv("CAT_FAST_BACKEND", "wide_attention=triton")
    return "cpu" if backends.triton_is_interpreted() else "cuda"


def inputs(shape, *, device, dtype=torch.float32):
    """Return q, k, v and the gradient of y."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(4, *shape, generator=generator).to(device, dtype).unbind())


def value_and_gradients(function, q, k, v, grad):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def float64_truth(*tensors):
    def formula(q, k, v):
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)

    return value_and_gradients(formula, *[t.double() for t in tensors])


def assert_near(got, want, tolerance):
    for name, ours, truth in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        scale = truth.abs().max().item() or 1.0  # with one position, dq and dk are zero
        assert_close(
            ours.double() / scale, truth / scale, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_value_and_gradients_match_float64(device, shape, dtype):
    tensors = inputs(shape, device=device, dtype=dtype)
    got = value_and_gradients(wide_attention, *tensors)
    assert all(t.dtype == dtype and t.shape == shape for t in got)
    assert_near(got, float64_truth(*tensors), TOLERANCE[dtype])


def test_large_scores_do_not_overflow_and_small_ones_count(device):
    q, k, v, grad = inputs((1, 17, 1, 256), device=device)
    tensors = q * 30, k, v, grad
    assert_near(value_and_gradients(wide_attention, *tensors), float64_truth(*tensors), 1e-4)


def test_inputs_may_be_views_and_gradients_arrive_transposed(device):
    q, k, v, grad = inputs((2, 9, 2, 256), device=device, dtype=torch.float16)
    want = value_and_gradients(wide_attention, q, k, v, grad)
    strided = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.mT.contiguous().mT,
        v.repeat(1, 2, 1, 1)[:, :9],
    )
    got = value_and_gradients(wide_attention, *strided, grad.mT.contiguous().mT)
    assert not any(t.is_contiguous() for t in strided)
    for ours, other in zip(got, want, strict=True):
        assert_close(ours, other, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("shape", [(0, 5, 1, 512), (2, 0, 1, 512), (2, 5, 0, 512)])
def test_empty_input_gives_empty_output_and_gradients(device, shape):
    for tensor in value_and_gradients(wide_attention, *inputs(shape, device=device)):
        assert tensor.shape == shape


@pytest.mark.parametrize("shape", [(1, 33, 1, 320), (1, 0, 1, 512)])
def test_is_deterministic_and_does_not_read_uninitialized_memory(triton, shape):
    """Allocations are filled with NaN, which exposes outputs and statistics that are not written."""
    tensors = inputs(shape, device=triton, dtype=torch.float16)
    plain = value_and_gradients(wide_attention, *tensors)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        poisoned = value_and_gradients(wide_attention, *tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


def test_operator_is_registered_as_torch_expects(triton):
    q, k, v, grad = inputs((1, 3, 2, 256), device=triton, dtype=torch.float16)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.cat_fast.wide_attention_triton.default, tuple(leaves))
    y, lse = torch.ops.cat_fast.wide_attention_triton(q, k, v)
    torch.library.opcheck(torch.ops.cat_fast.wide_attention_backward_triton.default, (grad, q, k, v, y, lse))


def test_compiles_without_a_graph_break(device):
    q, k, v, _ = inputs((1, 5, 1, 256), device=device)
    compiled = torch.compile(wide_attention, backend="aot_eager", fullgraph=True)
    assert_close(compiled(q, k, v), wide_attention(q, k, v))


def test_flops_are_counted_as_torch_counts_attention(triton):
    q, k, v, grad = inputs((1, 7, 2, 256), device=triton, dtype=torch.float16)
    with FlopCounterMode(display=False) as counter:
        value_and_gradients(wide_attention, q, k, v, grad)
    shape = (1, 2, 7, 256)
    forward, backward = sdpa_flop_count(*3 * [shape]), sdpa_backward_flop_count(*4 * [shape])
    assert counter.get_total_flops() == forward + backward > 0


def test_reference_passes_gradcheck():
    leaves = [torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(wide_attention_reference, leaves)


def test_autocast_works_as_in_sdpa(device):
    q, k, v, _ = inputs((1, 5, 1, 256), device=device)
    with torch.autocast(device, torch.bfloat16):
        mixed = wide_attention(q, k.bfloat16(), v.half())
        sdpa = F.scaled_dot_product_attention(q, k, v)
    assert mixed.dtype == sdpa.dtype == torch.bfloat16
    assert torch.equal(mixed, wide_attention(q.bfloat16(), k.bfloat16(), v.half().bfloat16()))
    with pytest.raises(ValueError, match=r"one dtype, got .* torch.float32, .* torch.bfloat16"):
        wide_attention(q, k.bfloat16(), v)


def test_autocast_leaves_float64_alone(monkeypatch):
    monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
    q, k, v, _ = (t.double() for t in inputs((1, 5, 1, 256), device="cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert wide_attention(q, k, v).dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.float64


def test_triton_is_not_chosen_before_it_is_measured(monkeypatch):
    def chosen():
        return backends._choose(
            "wide_attention", torch.device("cuda", 0), torch.bfloat16, False, (("head_dim", 512),)
        )

    monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
    assert chosen() == "reference"
    if backends.triton_unavailable_reason() is None:
        (row,) = (r for r in backends.report() if (r.op, r.backend) == ("wide_attention", "triton"))
        assert row.status == "not yet measured against SDPA on a GPU"
        monkeypatch.setenv("CAT_FAST_BACKEND", "triton")
        assert chosen() == "triton"


@pytest.mark.gpu
def test_sdpa_uses_the_memory_efficient_kernel():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    q, k, v, _ = inputs((1, 1, 64, 512), device="cuda", dtype=torch.bfloat16)
    choice = torch._fused_sdp_choice(q.requires_grad_(), k, v)
    assert choice == torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION.value


def test_the_middle_block_gives_the_same_on_both_backends(monkeypatch, triton):
    torch.manual_seed(0)
    block = Attention(256, 256, 32).to(triton)
    x = torch.randn(1, 256, 3, 5, device=triton)
    results = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("CAT_FAST_BACKEND", f"wide_attention={backend}")
        leaf = x.clone().requires_grad_()
        y = block(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()])])
    for ours, other in zip(*results, strict=True):
        assert_close(ours, other, atol=1e-5 * max(1.0, other.abs().max().item()), rtol=0)
    monkeypatch.setenv("CAT_FAST_BACKEND", "wide_attention=cpp")
    with pytest.raises(UserError, match="wide_attention has no such backend: use one of triton, reference"):
        block(x)
