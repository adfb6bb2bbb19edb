"""varlen_attention's Triton kernels, interpreted or on a GPU, against float64: forward and gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cat_fast.kernels.varlen_attention.op import varlen_attention
from cat_fast.kernels.varlen_attention.triton import (
    column_tiles,
    varlen_attention_backward_triton,
    varlen_attention_triton,
)

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 0, 63, 16, 70]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def offsets(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)


def packed(lengths, dim, dtype=torch.float32, heads=2):
    """Views of a fused qkv, the offsets, and an output gradient."""
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    qkv = torch.randn(sum(lengths), 3, heads, dim, generator=generator).to(DEVICE, dtype)
    grad = torch.randn(sum(lengths), heads, dim, generator=generator).to(DEVICE, dtype)
    return *qkv.unbind(1), offsets(lengths), grad


def run(q, k, v, cu_seqlens, grad, cu_seqlens_k=None):
    """out, lse, dq, dk, dv."""
    lengths = (cu_seqlens, 0, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, 0)
    out, lse = varlen_attention_triton(q, k, v, *lengths)
    return out, lse, *varlen_attention_backward_triton(grad, q, k, v, out, lse, *lengths)


def float64_truth(q, k, v, cu_seqlens, grad, cu_seqlens_k=None):
    """The same, by one softmax over all tokens under a block-diagonal mask."""
    leaves = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    of_query, of_key = (
        torch.arange(len(bounds) - 1).repeat_interleave(bounds.cpu().diff())
        for bounds in (cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k)
    )
    scores = torch.einsum("ihd,jhd->hij", leaves[0], leaves[1]) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(of_query[:, None] != of_key, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)  # a query without keys gets zeros
    out = torch.einsum("hij,jhd->ihd", weights, leaves[2])
    gradients = torch.autograd.grad(out, leaves, grad.cpu().double())
    return out.detach(), scores.detach().logsumexp(-1), *gradients


def assert_near(got, want, tolerance):
    for name, ours, truth in zip(("out", "lse", "dq", "dk", "dv")[: len(got)], got, want, strict=True):
        error = (ours.cpu().double() - truth).abs().max() / truth.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        *((torch.float32, dim) for dim in (32, 40, 56, 72, 128)),
        *((torch.bfloat16, dim) for dim in (32, 40, 72, 128)),
        *((torch.float16, dim) for dim in (40, 72)),
    ],
    ids=str,
)
def test_value_and_gradients_match_float64(dtype, dim):
    tensors = packed(LENGTHS, dim, dtype)
    got = run(*tensors)
    assert_near(got, float64_truth(*tensors), TOLERANCE[dtype])
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_have_lengths_of_their_own(dtype):
    """Cross-attention: more keys than queries, fewer, one, none, and keys that no query asks for."""
    queries, keys = [70, 1, 5, 3, 0, 33], [9, 66, 1, 0, 4, 40]
    q, *_, cu_seqlens, grad = packed(queries, 72, dtype)
    _, k, v, cu_seqlens_k, _ = packed(keys, 72, dtype)
    got = run(q, k, v, cu_seqlens, grad, cu_seqlens_k)
    want = float64_truth(q, k, v, cu_seqlens, grad, cu_seqlens_k)
    alone = slice(76, 79)  # the queries without keys
    assert got[1][:, alone].isneginf().all()
    assert want[1][:, alone].isneginf().all()
    got, want = ([x[0], x[1].masked_fill(x[1].isneginf(), 0.0), *x[2:]] for x in (got, want))
    assert_near(got, want, TOLERANCE[dtype])


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # of rows past the end, which are infinite and not stored
def test_scores_far_from_zero_neither_overflow_nor_vanish():
    q, k, v, cu_seqlens, grad = packed([70, 5], 40)
    direction = torch.zeros(40, device=DEVICE)
    direction[0] = 40.0
    tensors = (
        q + direction,
        k - direction,
        v,
        cu_seqlens,
        grad,
    )  # all scores near -250, but those beyond the end
    assert_near(run(*tensors), float64_truth(*tensors), 2e-4)  # to fp32, a score of 250 is known to 2e-5


def test_strides_that_are_no_multiples_of_eight_and_an_expanded_gradient():
    _, k, v, cu_seqlens, _ = packed([5, 66], 40)
    odd = torch.randn(71, 2, 43, device=DEVICE)[:, :, 1:41]
    apart = torch.empty(71, 2, 80, device=DEVICE)[..., ::2].copy_(k)
    grad = torch.ones((), device=DEVICE).expand(71, 2, 40)
    tensors = odd, apart, v, cu_seqlens, grad
    assert_near(run(*tensors), float64_truth(*tensors), 1e-5)


def test_a_sequence_has_the_same_bits_alone_and_packed_and_each_time():
    q, k, v, cu_seqlens, grad = packed(LENGTHS, 72, torch.bfloat16)
    together, again = (run(q, k, v, cu_seqlens, grad) for _ in range(2))
    assert all(map(torch.equal, together, again))
    for begin, end in cu_seqlens.unfold(0, 2, 1).tolist():
        if end > begin:
            own = slice(begin, end)
            alone = run(
                q[own],
                k[own],
                v[own],
                torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE),
                grad[own],
            )
            out, lse, *gradients = together
            assert torch.equal(alone[1], lse[:, own])
            pairs = zip((alone[0], *alone[2:]), (out, *gradients), strict=True)
            assert all(torch.equal(one, all_[own]) for one, all_ in pairs)


def test_more_sequences_than_a_program_looks_through_at_a_time():
    lengths = [1, 0, 2] * 100
    tensors = packed(lengths, 32, heads=1)
    out, lse = varlen_attention_triton(*tensors[:4], 2, tensors[3], 2)
    want = float64_truth(*tensors)
    assert_near((out, lse), want[:2], 1e-5)


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_tokens(lengths):
    out, lse, *gradients = run(*packed(lengths, 72))
    assert lse.shape == (2, 0)
    assert all(x.shape == (0, 2, 72) for x in (out, *gradients))


def test_reads_no_memory_it_did_not_write():
    """With NaN in every fresh allocation, a row that no program wrote shows."""
    tensors = packed(LENGTHS, 40)
    plain = run(*tensors)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        poisoned = run(*tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, plain, poisoned))


@pytest.mark.parametrize("widest", [64, 128])
@pytest.mark.parametrize("dim", range(32, 129, 8))
def test_tiles_cover_the_columns_and_no_whole_tile_is_masked(dim, widest):
    main, tail = column_tiles(dim, widest)
    assert dim <= main + tail <= 2 ** (dim - 1).bit_length()
    assert {main, tail} <= {0, 16, 32, 64, widest}
    assert main <= widest
    if tail:
        assert main < dim


def test_new_lengths_compile_nothing_new():
    """Batches of other T, S and longest sequence, 1 and multiples of 16 among them, use the same kernels."""
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


def test_operator_is_registered_as_torch_expects(force):
    force("varlen_attention", "triton")
    q, k, v, cu_seqlens, grad = packed([5, 0, 3], 40)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    lengths = cu_seqlens, 5, cu_seqlens, 5
    torch.library.opcheck(torch.ops.cat_fast.varlen_attention_triton.default, (*leaves, *lengths))
    saved = torch.ops.cat_fast.varlen_attention_triton(q, k, v, *lengths)
    torch.library.opcheck(
        torch.ops.cat_fast.varlen_attention_backward_triton.default, (grad, q, k, v, *saved, *lengths)
    )


def test_forced_it_serves_the_public_function_with_its_gradients(force):
    force("varlen_attention", "triton")
    *tensors, cu_seqlens, grad = packed([5, 0, 3], 72)
    want = float64_truth(*tensors, cu_seqlens, grad)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = varlen_attention(*leaves, cu_seqlens, 5)
    got = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    for ours, truth in zip(got, (want[0], *want[2:]), strict=True):
        assert (ours.cpu().double() - truth).abs().max() / truth.abs().max() <= 1e-5
