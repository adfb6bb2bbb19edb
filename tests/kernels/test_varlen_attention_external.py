"""varlen_attention through torch's operator and xformers: their arguments, and on a GPU their results."""

import subprocess
import sys

import pytest
import torch

from cat_fast.kernels.varlen_attention import external
from cat_fast.kernels.varlen_attention.reference import varlen_attention_reference

FUNCTIONS = {
    "torch": (external.torch_varlen, external.torch_unavailable_reason),
    "xformers": (external.xformers_varlen, external.xformers_unavailable_reason),
}


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


@pytest.mark.parametrize("lengths", [[5], [4, 9, 9, 2], [3, 0, 1]], ids=str)
def test_the_mask_for_xformers_is_the_one_it_would_build_from_lengths_on_the_host(lengths):
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    cu_seqlens, tokens = offsets(lengths), sum(lengths)
    ours = external.block_diagonal_mask(cu_seqlens, max(lengths), cu_seqlens, max(lengths))
    theirs = attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=torch.device("cpu"))
    for ours_info, theirs_info in ((ours.q_seqinfo, theirs.q_seqinfo), (ours.k_seqinfo, theirs.k_seqinfo)):
        assert torch.equal(ours_info.seqstart, theirs_info.seqstart)
        assert ours_info.max_seqlen == theirs_info.max_seqlen
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = sequence[:, None] == sequence
    assert torch.equal(ours.materialize((tokens, tokens)) == 0, allowed)
    assert torch.equal(ours.materialize((tokens, tokens)), theirs.materialize((tokens, tokens)))


def test_the_operator_of_torch_accepts_our_arguments_and_differentiates():
    """Run on meta tensors: torch's checks and shapes without a kernel."""
    qkv = torch.empty(9, 3, 2, 72, dtype=torch.bfloat16, device="meta", requires_grad=True)
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    out = external.torch_varlen(*qkv.unbind(1), cu_seqlens, 5, cu_seqlens, 5)
    assert (out.shape, out.dtype) == ((9, 2, 72), torch.bfloat16)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert grad.shape == qkv.shape


@pytest.mark.parametrize("name", FUNCTIONS)
def test_zero_tokens(name):
    function, _ = FUNCTIONS[name]
    leaves = [torch.empty(0, 2, 72, requires_grad=True) for _ in range(3)]
    out = function(*leaves, offsets([0, 0]), 0, offsets([0, 0]), 0)
    assert out.shape == (0, 2, 72)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), leaves)] == [(0, 2, 72)] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_a_gpu_the_reason_is_reported(name):
    _, unavailable_reason = FUNCTIONS[name]
    assert unavailable_reason() == "no CUDA device"


def test_importing_the_module_does_not_import_xformers():
    code = "import sys, cat_fast.kernels.varlen_attention.external; print('xformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_on_a_gpu_values_and_gradients_match_float64(name, dtype):
    function, unavailable_reason = FUNCTIONS[name]
    if (reason := unavailable_reason()) is not None:
        pytest.skip(f"varlen_attention by {name}: {reason}")
    torch.manual_seed(0)
    lengths = [64, 1, 256, 63]
    qkv = torch.randn(sum(lengths), 3, 4, 72, device="cuda").to(dtype)
    cu_seqlens = offsets(lengths, "cuda")
    results = []
    for leaf, run in (
        (qkv.clone().requires_grad_(), lambda *x: function(*x, *(cu_seqlens, max(lengths)) * 2)),
        (qkv.double().requires_grad_(), lambda *x: varlen_attention_reference(*x, cu_seqlens)),
    ):
        out = run(*leaf.unbind(1))
        results.append((out, *torch.autograd.grad(out.sum() + out.square().sum(), leaf)))
    for ours, truth in zip(*results, strict=True):
        assert (ours.double() - truth).abs().max() <= 1e-2 * truth.abs().max()
