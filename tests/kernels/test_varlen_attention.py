"""varlen_attention: each sequence attends to itself alone, exactly as if it stood alone."""

import pytest
import torch
from torch.testing import assert_close

from cat_fast.errors import UserError
from cat_fast.kernels.varlen_attention.op import varlen_attention


def packed(lengths, heads=3, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, sum(lengths), heads, dim, generator=generator)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return q, k, v, cu_seqlens


def dense_truth(q, k, v, lengths):
    """One softmax over all tokens in float64, with a block-diagonal mask."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double()) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(sequence[:, None] != sequence, float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.double())


@pytest.mark.parametrize(
    "lengths", [[5], [3, 3, 3], [4, 4, 1, 7, 7, 4], [2, 0, 0, 2, 5], [63, 16, 16, 1]], ids=str
)
def test_equals_dense_attention_under_a_block_diagonal_mask(lengths):
    q, k, v, cu_seqlens = packed(lengths)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    got = varlen_attention(*leaves, cu_seqlens, max(lengths))
    want = dense_truth(*leaves, lengths)
    assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(got)
    for ours, truth in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad.double()), strict=True
    ):
        assert_close(ours, truth, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_agrees_with_the_mask_of_xformers():
    fmha = pytest.importorskip("xformers.ops.fmha.attn_bias")
    lengths = [4, 9, 9, 2]
    q, k, v, cu_seqlens = packed(lengths)
    mask = fmha.BlockDiagonalMask.from_seqlens(lengths).materialize((sum(lengths), sum(lengths)))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q, k, v)), attn_mask=mask
    ).transpose(0, 1)
    assert_close(varlen_attention(q, k, v, cu_seqlens, 9), want)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens_give_no_output_and_a_gradient(lengths):
    q, k, v, cu_seqlens = packed(lengths)
    q.requires_grad_()
    out = varlen_attention(q, k, v, cu_seqlens, 0)
    assert out.shape == (0, 3, 8)


def test_a_backend_it_does_not_have_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "cpp")
    with pytest.raises(UserError, match="varlen_attention has no such backend: it has reference"):
        varlen_attention(*packed([3]), 3)
