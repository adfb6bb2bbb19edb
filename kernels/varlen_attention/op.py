"""Attention over packed sequences: `varlen_attention` runs it on the best available backend."""

from itertools import pairwise
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from .. import backends, derivatives
from ..autocast import autocast
from ..registration import Operator
from .external import FAILURES, flash3_varlen, flash_varlen, set_failed, torch_varlen, xformers_varlen
from .reference import varlen_attention_reference

EXTERNAL = {
    "flash3": flash3_varlen,
    "flash": flash_varlen,
    "torch": torch_varlen,
    "xformers": xformers_varlen,
}


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> torch.Tensor:
    """Compute non-causal attention of every query to the keys of its own sequence, with scale 1 / √D.

    q: (T, H, D), k and v: (U, H, D), of one dtype, with any strides; views of a fused (T, 3, H, D) are not
    copied. cu_seqlens: int32 (S + 1,), rising from 0 to T; sequences may be empty. max_seqlen: an upper bound
    on the sequence lengths, in tokens. cu_seqlens_k, max_seqlen_k: the same for the keys, for
    cross-attention; by default those of the queries. Returns (T, H, D) of q's dtype, zeros for queries
    without keys. Sums are fp32 or wider. Under autocast it runs in the autocast dtype, as
    scaled_dot_product_attention does. Derivatives beyond gradients are computed through the reference.

    Raises ValueError if shapes or dtypes do not match. On the CPU and outside torch.compile, also raises it
    for invalid values of cu_seqlens or max_seqlen.
    """
    q, k, v = autocast(q, k, v)
    if cu_seqlens_k is None or max_seqlen_k is None:
        if cu_seqlens_k is not None or max_seqlen_k is not None:
            raise ValueError("varlen_attention: pass both cu_seqlens_k and max_seqlen_k, or neither")
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    _check(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    backend = backends.choose("varlen_attention", q, training=training, head_dim=q.shape[-1])
    while backend in EXTERNAL:
        try:
            return EXTERNAL[backend](q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
        except FAILURES as error:
            if backends.forced_backend("varlen_attention") or isinstance(error, torch.OutOfMemoryError):
                raise
            set_failed(backend, q, error)
        backend = backends.choose("varlen_attention", q, training=training, head_dim=q.shape[-1])
    if backend == "reference":
        return varlen_attention_reference(q, k, v, cu_seqlens, cu_seqlens_k)
    out, _lse = OPERATOR(backend, q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    return out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> None:
    like = q.dim() == k.dim() == 3 and q.shape[1:] == k.shape[1:] and k.shape == v.shape
    if not like or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, v))
        raise ValueError(
            "varlen_attention: expected q (T, H, D) and k, v of one shape (U, H, D), all of one dtype, "
            f"got {given}"
        )
    if cu_seqlens.shape != cu_seqlens_k.shape:
        shapes = f"{tuple(cu_seqlens.shape)} and {tuple(cu_seqlens_k.shape)}"
        raise ValueError(f"cu_seqlens and cu_seqlens_k: expected the same number of sequences, got {shapes}")
    _check_offsets("", cu_seqlens, q.shape[0], max_seqlen)
    if cu_seqlens_k is not cu_seqlens or q.shape[0] != k.shape[0]:
        _check_offsets("_k", cu_seqlens_k, k.shape[0], max_seqlen_k)


def _check_offsets(side: str, cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype != torch.int32:
        given = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(
            f"varlen_attention: expected cu_seqlens{side} of shape (S + 1,) and dtype int32, got {given}"
        )
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu" or is_fake(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens{side}: expected offsets that rise from 0 to {tokens} (all tokens), got {bounds}"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"max_seqlen{side}: expected at least the longest length, {max(lengths)}, got {max_seqlen}"
        )


def _fake(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _dim = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32)


def _fake_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen, cu_seqlens_k, ctx.max_seqlen_k = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, cu_seqlens_k)


def _backward(
    operator: Any, ctx: Any, grad_out: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    *tensors, cu_seqlens_k = ctx.saved_tensors
    gradients = operator(grad_out, *tensors, ctx.max_seqlen, cu_seqlens_k, ctx.max_seqlen_k)
    return (*gradients, None, None, None, None)


def _reference_backward(
    ctx: Any, grad_out: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, _out, _lse, cu_seqlens, cu_seqlens_k = ctx.saved_tensors

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return varlen_attention_reference(q, k, v, cu_seqlens, cu_seqlens_k)

    return (*derivatives.vjp(forward, (q, k, v), grad_out), None, None, None, None)


def _flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: Any, **_: Any) -> int:
    """Count as torch does, per sequence; lengths without values (fake tensors) count as max_seqlen."""
    return sum(sdpa_flop_count(queries, keys, keys) for queries, keys in _shapes(q, *lengths))


def _flops_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *lengths: Any,
    **_: Any,
) -> int:
    """Count like `_flops`, with five products instead of two, recomputed scores included."""
    return sum(
        sdpa_backward_flop_count(queries, queries, keys, keys) for queries, keys in _shapes(q, *lengths)
    )


Shape = tuple[int, int, int, int]


def _shapes(
    q: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> list[tuple[Shape, Shape]]:
    """Return the shapes (1, H, length, D) of the queries and of the keys of each sequence."""
    _tokens, heads, dim = q.shape

    def lengths(offsets: torch.Tensor, longest: int) -> list[int]:
        if is_fake(offsets) or offsets.device.type == "meta":
            return [longest] * (offsets.shape[0] - 1)
        return offsets.diff().tolist()

    pairs = zip(lengths(cu_seqlens, max_seqlen), lengths(cu_seqlens_k, max_seqlen_k), strict=True)
    return [((1, heads, queries, dim), (1, heads, keys, dim)) for queries, keys in pairs]


def _triton() -> tuple[Any, Any]:
    from .triton import varlen_attention_backward_triton, varlen_attention_triton

    return varlen_attention_triton, varlen_attention_backward_triton


OPERATOR = Operator(
    name="varlen_attention",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    reference_backward=_reference_backward,
    flops=_flops,
    flops_backward=_flops_backward,
    flops_from_values=True,
)
OPERATOR.register_compiled()
OPERATOR.register_triton(_triton)
