"""varlen_attention: every backend of this machine against float64, outputs and gradients."""

import json
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.errors import UserError
from cat_fast.kernels.varlen_attention.op import varlen_attention
from cat_fast.kernels.varlen_attention.reference import varlen_attention_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # of the greatest value
LENGTHS = [[5], [1, 63, 0, 64, 65], [4, 4, 1, 7, 7, 4], [16, 1000, 33], [0, 0, 300, 96, 96, 0]]
CASES = [(lengths, 72) for lengths in LENGTHS] + [([1, 63, 0, 64, 65], dim) for dim in (32, 40, 128)]
INTERPRETED = [
    *((torch.float32, dim) for dim in (32, 40, 56, 72, 128)),
    *((torch.bfloat16, dim) for dim in (32, 40, 72, 128)),
    *((torch.float16, dim) for dim in (40, 72)),
]
CROSSED = [
    ([70, 1, 5, 300], [9, 66, 1, 120]),
    ([4, 4, 4, 9], [7, 7, 3, 3]),
    ([5, 3, 0, 33, 0], [2, 0, 4, 40, 0]),  # queries without keys, and keys without queries
    ([3, 2], [0, 0]),
    ([0, 0], [3, 2]),
]
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # from Triton's interpreter, in rows past the end, which are infinite and not stored


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request, force):
    force("varlen_attention", request.param)
    return request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["cpp", "triton"])
def kernel(request, force):
    """Force each backend of this machine that has its own kernels, and return its device."""
    force("varlen_attention", request.param)
    return "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def compiled(require):
    """Skip without a compiled backend, so that the reference is not compared with itself."""
    require("varlen_attention", "cpp")


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def packed(lengths, heads=2, dim=72, dtype=torch.float32, device="cpu"):
    """Return views of a fused (T, 3, H, D), the gradient of the output, and cu_seqlens."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, dim, generator=generator).to(device, dtype)
    grad = torch.randn(sum(lengths), heads, dim, generator=generator).to(device, dtype)
    return *qkv.unbind(1), grad, offsets(lengths, device)


def value_and_gradients(function, q, k, v, grad):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def crossed(queries, keys, heads=2, dim=72, dtype=torch.float32, device="cpu"):
    """Return q, k and v of different lengths, the gradient of the output, and the offsets of both sides."""
    q, _, _, grad, cu_seqlens = packed(queries, heads, dim, dtype, device)
    _, k, v, _, cu_seqlens_k = packed(keys, heads, dim, dtype, device)
    return q, k, v, grad, cu_seqlens, cu_seqlens_k


def run(q, k, v, grad, *cu_seqlens):
    """Run self-attention, or cross-attention if the keys' offsets are given too."""
    lengths = [item for bounds in cu_seqlens for item in (bounds, int(bounds.diff().max()))]
    return value_and_gradients(lambda *t: varlen_attention(*t, *lengths), q, k, v, grad)


def float64_truth(q, k, v, grad, cu_seqlens, cu_seqlens_k=None):
    """Compute one softmax over all tokens in float64, with a block-diagonal mask."""
    of_query, of_key = (
        torch.arange(len(bounds) - 1).repeat_interleave(bounds.cpu().diff())
        for bounds in (cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k)
    )

    def formula(q, k, v):
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(of_query[:, None] != of_key, float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0)  # a query without keys gets zeros
        return torch.einsum("hij,jhd->ihd", weights, v)

    return value_and_gradients(formula, *[t.cpu().double() for t in (q, k, v, grad)])


def assert_near(got, want, tolerance):
    for name, ours, truth in zip(("out", "dq", "dk", "dv")[: len(got)], got, want, strict=True):
        if not truth.any():
            assert not ours.any(), name
            continue
        error = (ours.cpu().double() - truth).abs().max() / truth.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"  # also fails for NaN


@pytest.mark.parametrize(
    ("backend", "lengths", "dim", "dtype"),
    [
        *((name, *case, dtype) for name, case, dtype in product(("reference", "cpp"), CASES, TOLERANCE)),
        *(("triton", [1, 0, 63, 16, 70], dim, dtype) for dtype, dim in INTERPRETED),
    ],
    indirect=["backend"],
    ids=str,
)
def test_value_and_gradients_match_float64(backend, device, lengths, dim, dtype):
    tensors = packed(lengths, dim=dim, dtype=dtype, device=device)
    got = run(*tensors)
    assert_near(got, float64_truth(*tensors), TOLERANCE[dtype])
    assert {(t.dtype, t.shape) for t in got} == {(dtype, tensors[0].shape)}


@pytest.mark.parametrize(
    ("backend", "queries", "keys", "dtype"),
    [
        *((name, *case, dtype) for name, case, dtype in product(("reference", "cpp"), CROSSED, TOLERANCE)),
        *(
            ("triton", [70, 1, 5, 3, 0, 33], [9, 66, 1, 0, 4, 40], dtype)
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
    indirect=["backend"],
    ids=str,
)
def test_keys_may_have_other_lengths_than_queries(backend, device, queries, keys, dtype):
    tensors = crossed(queries, keys, dtype=dtype, device=device)
    got = run(*tensors)
    assert [(t.dtype, t.shape) for t in got] == [(dtype, tensors[i].shape) for i in (0, 0, 1, 2)]
    assert_near(got, float64_truth(*tensors), TOLERANCE[dtype])


def test_cross_attention_of_a_sequence_is_bit_identical_alone_and_in_a_pack(kernel):
    q, k, v, grad, cu_seqlens, cu_seqlens_k = crossed([65, 1, 70], [40, 80, 3], device=kernel)
    together, again = (run(q, k, v, grad, cu_seqlens, cu_seqlens_k) for _ in range(2))
    assert all(map(torch.equal, together, again))
    bounds = zip(pairwise(cu_seqlens.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for (begin, end), (begin_k, end_k) in bounds:
        queries, keys = slice(begin, end), slice(begin_k, end_k)
        own_offsets = offsets([end - begin], kernel), offsets([end_k - begin_k], kernel)
        alone = run(q[queries], k[keys], v[keys], grad[queries], *own_offsets)
        own = [t[rows] for t, rows in zip(together, (queries, queries, keys, keys), strict=True)]
        assert all(map(torch.equal, alone, own))


def test_reference_passes_gradcheck():
    q, k, v, _, cu_seqlens = packed([3, 0, 2, 2], heads=1, dim=2, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: varlen_attention_reference(*t, cu_seqlens), leaves)


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_agrees_with_the_mask_of_xformers(backend):
    fmha = pytest.importorskip("xformers.ops.fmha.attn_bias")
    lengths = [4, 9, 9, 70]
    q, k, v, _, cu_seqlens = packed(lengths)
    mask = fmha.BlockDiagonalMask.from_seqlens(lengths).materialize((sum(lengths), sum(lengths)))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q, k, v)), attn_mask=mask
    ).transpose(0, 1)
    assert_close(varlen_attention(q, k, v, cu_seqlens, 70), want)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_zero_tokens_give_an_empty_output_with_a_gradient(device, lengths):
    q, k, v, grad, cu_seqlens = packed(lengths, device=device)
    got = value_and_gradients(lambda *t: varlen_attention(*t, cu_seqlens, 0), q, k, v, grad)
    assert [t.shape for t in got] == [(0, 2, 72)] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_is_bit_identical_alone_and_in_a_pack(kernel, dtype):
    *tensors, cu_seqlens = packed([65, 1, 0, 100, 16], dtype=dtype, device=kernel)
    together = run(*tensors, cu_seqlens)
    for start, end in pairwise(cu_seqlens.tolist()):
        if end > start:
            alone = run(*[t[start:end] for t in tensors], offsets([end - start], kernel))
            assert all(torch.equal(a, b[start:end]) for a, b in zip(alone, together, strict=True))


def test_unaligned_strides_and_an_expanded_gradient(kernel):
    _, k, v, _, cu_seqlens = packed([5, 66], dim=40, device=kernel)
    odd = torch.randn(71, 2, 43, generator=torch.Generator().manual_seed(1)).to(kernel)[:, :, 1:41]
    apart = torch.empty(71, 2, 80, device=kernel)[..., ::2].copy_(k)
    grad = torch.ones((), device=kernel).expand(71, 2, 40)
    tensors = odd, apart, v, grad, cu_seqlens
    assert_near(run(*tensors), float64_truth(*tensors), 1e-5)


@pytest.mark.usefixtures("compiled")
def test_strides_do_not_matter():
    q, k, v, grad, cu_seqlens = packed([63, 1, 40])
    want = run(*[t.contiguous() for t in (q, k, v, grad)], cu_seqlens)
    heads_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v, grad)]
    dim_first = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (q, k, v, grad)]
    for given in ((q, k, v, grad), heads_first, dim_first):
        assert all(torch.equal(a, b) for a, b in zip(run(*given, cu_seqlens), want, strict=True))
    ones = torch.ones_like(grad)
    got = run(q, k, v, torch.ones(()).expand(grad.shape), cu_seqlens)  # the gradient of sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(got, run(q, k, v, ones, cu_seqlens), strict=True))


@pytest.mark.usefixtures("compiled")
def test_result_does_not_depend_on_the_number_of_threads():
    tensors = packed([300, 33, 700, 64], heads=3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(*tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_does_not_read_uninitialized_memory(kernel):
    """Allocations are filled with NaN, which exposes outputs that are not written."""
    tensors = packed([63, 0, 1, 129], dim=40, device=kernel)
    plain = run(*tensors)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        poisoned = run(*tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


def test_scores_far_from_zero_neither_overflow_nor_vanish(kernel):
    q, k, *others = packed([70, 5], dim=40, device=kernel)
    direction = torch.zeros(40, device=kernel)
    direction[0] = 40.0
    tensors = (q + direction, k - direction, *others)  # all scores near -250, but those beyond the end
    assert_near(run(*tensors), float64_truth(*tensors), 2e-4)  # in fp32, a score of 250 has an error of 2e-5


@pytest.mark.parametrize("size", [1e2, 1e-4])
def test_large_scores_do_not_overflow_and_small_ones_average(device, size):
    q, k, v, grad, cu_seqlens = packed([150, 20], device=device)
    got = run(q * size, k, v, grad, cu_seqlens)[0]
    want = float64_truth(q * size, k, v, grad, cu_seqlens)[0]
    tolerance = 2e-4 if size > 1 else 1e-6  # scores of 1e3 have 6e-5 of error
    assert_close(got.cpu().double(), want, atol=tolerance, rtol=0)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_propagates_within_its_sequence_and_head_only(which):
    *tensors, cu_seqlens = packed([70, 70])
    tensors[which] = tensors[which].clone()
    tensors[which][80, 1, 3] = float("nan")
    out, *gradients = run(*tensors, cu_seqlens)
    for result in (out, *gradients):
        assert result[:70].isfinite().all()
        assert result[:, 0].isfinite().all()
    assert out[80, 1].isnan().any()
    assert gradients[2 - which][70:, 1].isnan().any() if which != 1 else gradients[0][70:, 1].isnan().all()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*(("cpp", dtype) for dtype in TOLERANCE), ("triton", torch.float32)],
    indirect=["backend"],
    ids=str,
)
def test_operator_is_registered_as_torch_expects(backend, device, dtype):
    suffix = "_triton" if backend == "triton" else ""
    names = f"varlen_attention{suffix}", f"varlen_attention_backward{suffix}"
    forward, backward = (getattr(torch.ops.cat_fast, name).default for name in names)
    q, k, v, grad, cu_seqlens = packed([5, 0, 3], dtype=dtype, device=device)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    lengths = cu_seqlens, 5, cu_seqlens, 5
    torch.library.opcheck(forward, (*leaves, *lengths))
    out, lse = forward(q, k, v, *lengths)
    torch.library.opcheck(backward, (grad, q, k, v, out, lse, *lengths))
    scores = torch.einsum("ihd,jhd->hij", q[:5].float(), k[:5].float()) / 72**0.5
    assert_close(lse[:, :5], scores.logsumexp(-1))
    _, none = forward(q, k[:0], v[:0], cu_seqlens, 5, torch.zeros_like(cu_seqlens), 0)
    assert none.isneginf().all()  # queries without keys


@pytest.mark.usefixtures("compiled")
def test_new_lengths_do_not_recompile_the_graph():
    """T, S and the longest length change. The first batch has distinct sizes, or torch would equate them."""
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q, k, v, cu_seqlens, max_seqlen):
        return varlen_attention(q, k, v, cu_seqlens, max_seqlen) * 1

    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([5, 7, 9, 2], [3, 3, 8], [64], [16, 2, 2, 2, 0, 31], [1] * 40, [100, 1]):
        q, k, v, grad, cu_seqlens = packed(lengths)
        call = partial(compiled, cu_seqlens=cu_seqlens, max_seqlen=max(lengths))
        got = value_and_gradients(call, q, k, v, grad)
        assert all(torch.equal(a, b) for a, b in zip(got, run(q, k, v, grad, cu_seqlens), strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_autocast_decides_the_dtype(backend, dtypes):
    q, k, v, grad, cu_seqlens = packed([20, 5])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = [t.to(dtype) for t, dtype in zip((q, k, v), dtypes, strict=True)]
        got = value_and_gradients(lambda *t: varlen_attention(*t, cu_seqlens, 20), *mixed, grad.bfloat16())
    want = run(*[t.bfloat16() for t in (q, k, v, grad)], cu_seqlens)
    assert got[0].dtype == torch.bfloat16
    assert [t.dtype for t in got[1:]] == list(dtypes)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, want, strict=True))


def test_autocast_leaves_float64_alone():
    q, k, v, _, cu_seqlens = packed([3, 4], dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = varlen_attention(q, k, v, cu_seqlens, 4)
    assert torch.equal(got, varlen_attention_reference(q, k, v, cu_seqlens))


@pytest.mark.usefixtures("compiled")
def test_flops_are_counted_per_sequence():
    lengths, heads, dim = [5, 0, 3, 3], 2, 72
    q, k, v, grad, cu_seqlens = packed(lengths, heads, dim)
    one_product = 2 * heads * dim * sum(n**2 for n in lengths)
    with FlopCounterMode(display=False) as counter:
        run(q, k, v, grad, cu_seqlens)
    assert counter.get_total_flops() == (2 + 5) * one_product
    with FlopCounterMode(
        display=False
    ) as counter:  # without values, as in torch: all sequences have the longest length
        *tensors, offsets_ = [t.to("meta") for t in (q, k, v, cu_seqlens)]
        torch.ops.cat_fast.varlen_attention(*tensors, offsets_, 5, offsets_, 5)
    assert counter.get_total_flops() == 4 * heads * dim * 4 * 5**2
    keys = [7, 2, 1, 0]
    with FlopCounterMode(display=False) as counter:
        run(*crossed(lengths, keys, heads, dim))
    products = sum(n * m for n, m in zip(lengths, keys, strict=True))
    assert counter.get_total_flops() == (2 + 5) * 2 * heads * dim * products


def test_tensors_that_no_compiled_backend_accepts_run_on_the_reference(monkeypatch):
    monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
    for dim, dtype in ((36, torch.float32), (24, torch.float32), (136, torch.float32), (72, torch.float64)):
        q, k, v, _, cu_seqlens = packed([3, 4], dim=dim, dtype=dtype)
        got = varlen_attention(q, k, v, cu_seqlens, 4)
        assert torch.equal(got, varlen_attention_reference(q, k, v, cu_seqlens))


@pytest.mark.usefixtures("compiled")
def test_a_forced_backend_names_the_violated_constraint(monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "cpp")
    q, k, v, _, cu_seqlens = packed([3], dim=36)
    with pytest.raises(UserError, match="expected head_dim 32 to 128 in steps of 8, got 36"):
        varlen_attention(q, k, v, cu_seqlens, 3)
    with pytest.raises(UserError, match=r"expected torch.float32 or .*, got torch.float64"):
        varlen_attention(q.double(), k.double(), v.double(), cu_seqlens, 3)
    monkeypatch.setenv("CAT_FAST_BACKEND", "fortran")
    with pytest.raises(UserError, match="unknown"):
        varlen_attention(q, k, v, cu_seqlens, 3)


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_invalid_arguments_are_refused(backend):
    q, k, v, _, cu_seqlens = packed([3, 4])
    with pytest.raises(ValueError, match="of one shape"):
        varlen_attention(q, k[:6], v, cu_seqlens, 4)
    with pytest.raises(ValueError, match="one dtype"):
        varlen_attention(q, k.bfloat16(), v, cu_seqlens, 4)
    with pytest.raises(ValueError, match="int32"):
        varlen_attention(q, k, v, cu_seqlens.long(), 4)
    for wrong in ([0, 3, 6], [1, 3, 7], [0, 5, 3, 7], [0, 3, 8]):
        with pytest.raises(ValueError, match="expected offsets that rise from 0 to 7"):
            varlen_attention(q, k, v, torch.tensor(wrong, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="max_seqlen: expected at least the longest length, 4, got 3"):
        varlen_attention(q, k, v, cu_seqlens, 3)
    with pytest.raises(ValueError, match="max_seqlen_k: expected at least the longest length, 4, got 3"):
        varlen_attention(q, k, v, cu_seqlens, 4, offsets([3, 4]), 3)
    with pytest.raises(ValueError, match="cu_seqlens_k: expected offsets that rise from 0 to 7"):
        varlen_attention(q, k, v, cu_seqlens, 4, offsets([3, 3]), 4)
    with pytest.raises(ValueError, match=r"same number of sequences, got \(3,\) and \(2,\)"):
        varlen_attention(q, k, v, cu_seqlens, 4, offsets([7]), 7)
    with pytest.raises(ValueError, match="both cu_seqlens_k and max_seqlen_k, or neither"):
        varlen_attention(q, k, v, cu_seqlens, 4, cu_seqlens)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("wrong", [[0, 3, 6], [-1, 3, 7], [0, 9, 7], []])
def test_the_compiled_operator_checks_cu_seqlens(wrong):
    q, k, v, _, good = packed([3, 4])
    bad = torch.tensor(wrong, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        torch.ops.cat_fast.varlen_attention(q, k, v, bad, 7, good, 7)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        torch.ops.cat_fast.varlen_attention(q, k, v, good, 7, bad, 7)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_more_sequences_than_a_triton_program_scans_at_a_time(backend, device):
    q, k, v, grad, cu_seqlens = packed([1, 0, 2] * 100, heads=1, dim=32, device=device)
    out = varlen_attention(q, k, v, cu_seqlens, 2)
    assert_near([out], float64_truth(q, k, v, grad, cu_seqlens)[:1], 1e-5)


@pytest.mark.parametrize("widest", [64, 128])
@pytest.mark.parametrize("dim", range(32, 129, 8))
def test_triton_tiles_cover_the_columns_without_a_fully_masked_tile(dim, widest):
    from cat_fast.kernels.varlen_attention.triton import column_tiles

    main, tail = column_tiles(dim, widest)
    assert dim <= main + tail <= 2 ** (dim - 1).bit_length()
    assert {main, tail} <= {0, 16, 32, 64, widest}
    assert main <= widest
    if tail:
        assert main < dim


def test_new_lengths_do_not_recompile_the_kernels():
    """Batches of different T, S and longest length, including 1 and multiples of 16, use the same kernels."""
    script = """
import json, torch
from benchmarks.static.compiler import recording
from cat_fast.kernels.varlen_attention.triton import varlen_attention_backward_triton, varlen_attention_triton

with recording(80) as compiled:
    for tokens, sequences in ((1, 1), (16, 1), (17, 16), (640, 3)):
        q, k, v = torch.empty(tokens, 3, 4, 32, dtype=torch.bfloat16, device="meta").unbind(1)
        cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
        lengths = cu_seqlens, tokens, cu_seqlens, tokens
        out, lse = varlen_attention_triton(q, k, v, *lengths)
        varlen_attention_backward_triton(out, q, k, v, out, lse, *lengths)
print(json.dumps([len(compiled), len(set(map(id, compiled)))]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    launched, different = json.loads(ran.stdout)
    assert (launched, different) == (12, 3)
