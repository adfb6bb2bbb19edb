"""Attention over packed sequences: `varlen_attention` runs it with the best backend there is."""

from itertools import pairwise
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from .. import backends
from ..autocast import autocast
from ..registration import Operator
from .reference import varlen_attention_reference
from .routes import torch_varlen, xformers_varlen

ROUTES = {"torch": torch_varlen, "xformers": xformers_varlen}


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """Non-causal attention of every token to the tokens of its own sequence, scaled by 1 / √D.

    q, k, v: (T, H, D) of one dtype, with any strides; views of a fused (T, 3, H, D) are not copied.
    cu_seqlens: int32 (S + 1,), rising from 0 to T; a sequence may be empty. max_seqlen: at least the length
    of the longest, in tokens. Returns (T, H, D) of q's dtype; sums are fp32 at least. Under autocast it runs
    in the autocast dtype, as scaled_dot_product_attention does. Differentiable once; where second derivatives
    are needed, use the reference.

    Raises ValueError if shapes or dtypes do not fit, and, where their values are at hand (on the CPU, outside
    torch.compile), if cu_seqlens or max_seqlen do not.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, cu_seqlens, max_seqlen)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    backend = backends.choose("varlen_attention", q, training=training, head_dim=q.shape[-1])
    if backend in ROUTES:
        return ROUTES[backend](q, k, v, cu_seqlens, max_seqlen)
    if backend == "reference":
        return varlen_attention_reference(q, k, v, cu_seqlens)
    out, _lse = OPERATOR(backend, q, k, v, cu_seqlens, max_seqlen)
    return out


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> None:
    if q.dim() != 3 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, v))
        raise ValueError(f"varlen_attention takes q, k, v of one shape (T, H, D) and one dtype, not {given}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype != torch.int32:
        given = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"varlen_attention takes cu_seqlens of shape (S + 1,) and dtype int32, not {given}")
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu" or is_fake(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != q.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {q.shape[0]}: {bounds}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, and there is a sequence of {max(lengths)} tokens")


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _dim = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32)


def _fake_backward(
    grad_out: torch.Tensor, q: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)


def _backward(
    operator: Any, ctx: Any, grad_out: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return (*operator(grad_out, *ctx.saved_tensors, ctx.max_seqlen), None, None)


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *_: Any,
    **__: Any,
) -> int:
    """As torch counts attention, sequence by sequence; all are of max_seqlen where lengths have no values."""
    return sum(sdpa_flop_count(*[shape] * 3) for shape in _shapes(q, cu_seqlens, max_seqlen))


def _flops_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *_: Any,
    **__: Any,
) -> int:
    """As `_flops`: five products where forward has two, the scores anew among them."""
    return sum(sdpa_backward_flop_count(*[shape] * 4) for shape in _shapes(q, cu_seqlens, max_seqlen))


def _shapes(q: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> list[tuple[int, int, int, int]]:
    _tokens, heads, dim = q.shape
    without_values = is_fake(cu_seqlens) or cu_seqlens.device.type == "meta"
    lengths = [max_seqlen] * (cu_seqlens.shape[0] - 1) if without_values else cu_seqlens.diff().tolist()
    return [(1, heads, length, dim) for length in lengths]


def _triton() -> tuple[Any, Any]:
    from .triton import varlen_attention_backward_triton, varlen_attention_triton

    return varlen_attention_triton, varlen_attention_backward_triton


OPERATOR = Operator(
    name="varlen_attention",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
    flops_backward=_flops_backward,
    flops_from_values=True,
)
OPERATOR.register_compiled()
OPERATOR.register_triton(_triton)
