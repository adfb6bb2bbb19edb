"""adaln and gate_residual_adaln: every backend of this machine against float64, outputs and gradients."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from cat_fast.errors import UserError
from cat_fast.kernels.adaln.op import adaln, gate_residual_adaln
from cat_fast.kernels.adaln.reference import adaln_reference, gate_residual_adaln_reference

EPS = 1e-6
BACKENDS = ["reference-cpu", "cpp-cpu", "triton-cpu", pytest.param("triton-cuda", marks=pytest.mark.gpu)]
# (lengths, D): DiT's mix, empty sequences and odd width, several pieces, one feature, empty batches.
CASES = [
    ([4, 16, 4, 1], 48),
    ([0, 5, 0, 0, 33, 1, 0], 63),
    ([50], 8),
    ([3, 2], 1),
    ([3, 2], 1000),
    ([0, 0], 8),
    ([], 8),
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-12}


@pytest.fixture(params=BACKENDS)
def device(request, force):
    """Force a backend and return its device."""
    backend, device = request.param.split("-")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    force("adaln", backend)
    return device


@pytest.fixture
def compiled(device):
    """Return the suffix of the operator's name; skip the reference."""
    if os.environ["CAT_FAST_BACKEND"] == "reference":
        pytest.skip("the reference is not a torch operator")
    return {"cpp": "", "triton": "_triton"}[os.environ["CAT_FAST_BACKEND"]]


def inputs(lengths, features, *, device="cpu", dtype=torch.float32, rows_dtype=None, mean=0.5):
    """x, h, modulation (S, 6 D), cu_seqlens, and gradients of x_new and y."""
    torch.manual_seed(0)
    x, h, grad_x_new, grad_y = (torch.randn(4, sum(lengths), features) * 2 + mean).to(device, dtype).unbind()
    modulation = torch.randn(len(lengths), 6 * features).to(device, rows_dtype or dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return x, h, modulation, cu_seqlens, (grad_x_new, grad_y)


def modulated(x, h, modulation, cu_seqlens, functions=(adaln, gate_residual_adaln)):
    """Run both operators as a transformer block does: return x_new, y, and y of x alone."""
    shift1, scale1, gate, shift2, scale2, _ = modulation.chunk(6, dim=1)
    x_new, y = functions[1](x, h, gate, shift2, scale2, cu_seqlens, EPS)
    return x_new, y, functions[0](x, shift1, scale1, cu_seqlens, EPS)


def formula(x, h, modulation, cu_seqlens):
    """Compute the same, one sequence at a time."""
    outputs = [x[:0]], [x[:0]], [x[:0]]
    for s, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        shift1, scale1, gate, shift2, scale2, _ = modulation[s].chunk(6)
        x_new = x[begin:end] + gate * h[begin:end]
        outputs[0].append(x_new)
        outputs[1].append(normalized(x_new) * (1 + scale2) + shift2)
        outputs[2].append(normalized(x[begin:end]) * (1 + scale1) + shift1)
    return tuple(torch.cat(parts) for parts in outputs)


def normalized(x):
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt()


def outputs_and_gradients(function, x, h, modulation, cu_seqlens, grads):
    leaves = [t.detach().requires_grad_() for t in (x, h, modulation)]
    outputs = function(*leaves, cu_seqlens)
    gradients = torch.autograd.grad(outputs, leaves, [*grads, grads[1]], materialize_grads=True)
    return *(y.detach() for y in outputs), *gradients


def check(got, x, h, modulation, cu_seqlens, grads):
    doubles = [t.double() for t in (x, h, modulation)]
    want = outputs_and_gradients(formula, *doubles, cu_seqlens, [t.double() for t in grads])
    # A single feature is its own mean: the rounding error of 0 is multiplied by rstd, 1 / sqrt(EPS).
    tolerance = TOLERANCE[x.dtype] * (100 if x.shape[1] == 1 else 1)
    for name, ours, truth in zip(("x_new", "y", "y1", "dx", "dh", "dmodulation"), got, want, strict=True):
        scale = truth.abs().max().clamp(min=1.0) if truth.numel() else 1.0
        assert_close(
            ours.double() / scale, truth / scale, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("dtype", "rows_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "features"), CASES, ids=str)
def test_outputs_and_gradients_match_float64(device, lengths, features, dtype, rows_dtype):
    x, h, modulation, cu_seqlens, grads = inputs(
        lengths, features, device=device, dtype=dtype, rows_dtype=rows_dtype
    )
    got = outputs_and_gradients(modulated, x, h, modulation, cu_seqlens, grads)
    check(got, x, h, modulation, cu_seqlens, grads)
    assert [t.dtype for t in got] == [dtype] * 5 + [rows_dtype]


@pytest.mark.parametrize("features", [24, 21])  # in tiles of two tokens, and one token at a time
def test_triton_result_does_not_depend_on_the_tokens_per_program(force, monkeypatch, features):
    """Tiles end at the borders of odd sequences; chunks end inside of sequences and of tiles."""
    force("adaln", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = inputs([1, 3, 0, 16, 2, 7, 0, 1, 1, 5], features, device=device)
    results = []
    for multiprocessors in (1, 2, 132):  # 6, 4 and 1 tokens per program in forward
        monkeypatch.setattr("cat_fast.kernels.adaln.triton.multiprocessors", lambda x, n=multiprocessors: n)
        results.append(outputs_and_gradients(modulated, *tensors))
        check(results[-1], *tensors)
    for other in results[1:]:  # all but the modulation's gradient, whose sums follow the chunks
        assert all(torch.equal(a, b) for a, b in zip(results[0][:-1], other[:-1], strict=True))


def test_reference_passes_gradcheck():
    x, h, modulation, cu_seqlens, _ = inputs([2, 0, 3], 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, h, modulation)]
    references = adaln_reference, gate_residual_adaln_reference
    assert torch.autograd.gradcheck(lambda *t: modulated(*t, cu_seqlens, references), leaves)


def test_inputs_and_gradients_may_have_any_strides(device):
    x, h, modulation, cu_seqlens, grads = inputs([3, 0, 9, 1], 40, device=device)
    want = outputs_and_gradients(modulated, x, h, modulation, cu_seqlens, grads)

    def strided(t):
        return t.t().contiguous().t()

    got = outputs_and_gradients(
        modulated, strided(x), h.repeat(1, 2)[:, :40], strided(modulation), cu_seqlens, [*map(strided, grads)]
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_one_row_may_serve_all_sequences(device):
    x, h, modulation, cu_seqlens, grads = inputs([3, 2], 16, device=device)
    shared = modulation[:1].expand(2, -1)
    got = outputs_and_gradients(modulated, x, h, shared, cu_seqlens, grads)
    check(got, x, h, shared, cu_seqlens, grads)


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_go_unused(device, used):
    x, h, modulation, cu_seqlens, grads = inputs([3, 2], 16, device=device)

    def gradients(function, *tensors, grad):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves, cu_seqlens)[used]
        return torch.autograd.grad(y, leaves, grad)

    got = gradients(modulated, x, h, modulation, grad=grads[used])
    want = gradients(formula, *(t.double() for t in (x, h, modulation)), grad=grads[used].double())
    for ours, truth in zip(got, want, strict=True):
        assert_close(ours.double(), truth, atol=1e-4, rtol=1e-5)


def test_a_mean_far_from_zero_does_not_cancel(device):
    x, h, modulation, cu_seqlens, _ = inputs([5, 2], 96, device=device, mean=1e4)
    got = modulated(x, h * 0, modulation, cu_seqlens)
    want = formula(x.double(), h.double() * 0, modulation.double(), cu_seqlens)
    assert_close(got[1].double(), want[1], atol=1e-2, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_value_affects_only_its_token(device, value):
    x, h, modulation, cu_seqlens, _ = inputs([3, 2], 40, device=device)
    x[1, 7] = value
    for y in modulated(x, h, modulation, cu_seqlens)[1:]:
        assert y[1].isnan().all()
        assert y[[0, 2, 3, 4]].isfinite().all()


def test_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "cpp")
    tensors = inputs([700, 3, 0, 257], 72)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(modulated, *tensors))
    finally:
        torch.set_num_threads(before)
    check(results[0], *tensors)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_does_not_read_uninitialized_memory_and_is_deterministic(device):
    """Allocations are filled with NaN, which exposes outputs and partial sums that are not written."""
    tensors = inputs([5, 0, 30, 1], 21, device=device)
    plain = outputs_and_gradients(modulated, *tensors)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        poisoned = outputs_and_gradients(modulated, *tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


def test_operators_are_registered_as_torch_expects(device, compiled):
    x, h, modulation, cu_seqlens, (grad_x_new, grad_y) = inputs([3, 0, 6], 10, device=device)
    statistics = torch.ones(2, 9, device=device).unbind()
    gate, shift, scale = (t.detach() for t in modulation.chunk(6, dim=1)[:3])
    for name, arguments in {
        "adaln": (x, shift, scale, cu_seqlens, EPS),
        "gate_residual_adaln": (x, h, gate, shift, scale, cu_seqlens, EPS),
        "adaln_backward": (grad_y, x, scale, cu_seqlens, *statistics),
        "gate_residual_adaln_backward": (grad_x_new, grad_y, x, h, gate, scale, cu_seqlens, *statistics),
    }.items():
        differentiable = not name.endswith("backward")
        leaves = [
            a.detach().requires_grad_()
            if differentiable and isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for a in arguments
        ]
        torch.library.opcheck(getattr(torch.ops.cat_fast, name + compiled).default, leaves)


def test_compiles_once_for_all_lengths(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(modulated, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for lengths in ([4, 2, 5], [3, 3], [7, 0, 2, 6, 1]):
        tensors = inputs(lengths, 16, device=device)
        check(outputs_and_gradients(function, *tensors), *tensors)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1] > 0


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype_of_the_stream_and_of_the_branches(device, low):
    x, h, modulation, cu_seqlens, grads = inputs([3, 2], 16, device=device)
    h, modulation, grad_y = h.to(low), modulation.to(low), grads[1].to(low)
    with torch.autocast(device, dtype=low):
        got = outputs_and_gradients(modulated, x, h, modulation, cu_seqlens, (grads[0], grad_y))
    # y has the dtype of the linear layer that reads it
    assert [t.dtype for t in got] == [torch.float32, low, torch.float32, torch.float32, low, low]
    grads = (grads[0], grad_y.float())
    want = outputs_and_gradients(modulated, x, h.float(), modulation.float(), cu_seqlens, grads)
    interpreted = os.environ["CAT_FAST_BACKEND"] == "triton" and device == "cpu"
    for ours, truth in zip(got, want, strict=True):
        if interpreted and low == torch.bfloat16:  # the interpreter truncates where hardware rounds
            assert_close(ours.float(), truth.float(), rtol=2**-7, atol=1e-6)
        else:
            assert torch.equal(ours, truth.to(ours.dtype))


def test_invalid_shapes_and_dtypes_are_refused():
    x, h, modulation, cu_seqlens, _ = inputs([3, 2], 16)
    gate, shift, scale, *_ = modulation.chunk(6, dim=1)
    with pytest.raises(ValueError, match=r"x: expected \(T, D\)"):
        adaln(x[0], shift, scale, cu_seqlens, EPS)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected \(S \+ 1,\) int32, got \(3,\) torch.int64"):
        adaln(x, shift, scale, cu_seqlens.long(), EPS)
    with pytest.raises(ValueError, match=r"shift: expected \(2, 16\), .* got \(1, 16\)"):
        adaln(x, shift[:1], scale, cu_seqlens, EPS)
    with pytest.raises(ValueError, match=r"gate: expected .* got \(2, 16\) torch.float64"):
        gate_residual_adaln(x, h, gate.double(), shift, scale, cu_seqlens, EPS)
    with pytest.raises(ValueError, match=r"h: expected \(5, 16\) torch.float32 like x"):
        gate_residual_adaln(x, h.half(), gate, shift, scale, cu_seqlens, EPS)


@pytest.mark.parametrize("bounds", [[0, 3, 4], [1, 3, 5], [0, 6, 5], [0, -1, 5]])
def test_sequences_that_do_not_fit_the_tokens_are_refused(monkeypatch, bounds):
    monkeypatch.setenv("CAT_FAST_BACKEND", "cpp")
    x, _, modulation, _, _ = inputs([3, 2], 16)
    shift, scale, *_ = modulation.chunk(6, dim=1)
    with pytest.raises(RuntimeError, match="cu_seqlens that rise from 0 to 5"):
        adaln(x, shift, scale, torch.tensor(bounds, dtype=torch.int32), EPS)


def test_a_forced_backend_names_the_violated_constraint(monkeypatch):
    x, _, modulation, cu_seqlens, _ = inputs([3, 2], 16, dtype=torch.float64)
    shift, scale, *_ = modulation.chunk(6, dim=1)
    monkeypatch.setenv("CAT_FAST_BACKEND", "cpp")
    with pytest.raises(UserError, match=r"CAT_FAST_BACKEND=cpp: adaln cannot run .*: expected .*float32"):
        adaln(x, shift, scale, cu_seqlens, EPS)
    monkeypatch.delenv("CAT_FAST_BACKEND")
    got = adaln(x, shift, scale, cu_seqlens, EPS)
    assert torch.equal(got, adaln_reference(x, shift, scale, cu_seqlens, EPS))


COMPILE = """
import torch
from benchmarks.static import compiler
from benchmarks.static.cases import adaln

def launch():
    for adaln.TOKENS, adaln.SEQUENCES in ((16384, 64), (1, 1), (1001, 7), (40000, 16)):
        adaln.launch(64, torch.bfloat16, torch.bfloat16, True)

print(*(kernel.name for kernel in compiler.compile_launched(launch, 80)))
"""


def test_triton_compiles_a_kernel_once_for_all_lengths():
    """Run in a separate process, because Triton interprets kernels in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.split() == ["adaln_forward_kernel", "adaln_backward_kernel", "adaln_combine_kernel"]
