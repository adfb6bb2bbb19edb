"""Attention over packed sequences in Triton: forward, and a backward pass without atomics.

A head of dimension D is one tile of columns, or two if that saves work: 72 is 64 + 16 with half of the 16
masked, not 128 (`column_tiles`). In fp32 neither is wider than 64: products without matrix instructions hold
complete rows in registers.

A program processes BLOCK rows of one sequence, either queries or keys; their lengths are independent.
Sequence s owns the programs starting at cu_seqlens[s] // BLOCK + s: always enough for its rows, and at most
one too many. So the grid needs only the numbers of rows and sequences, and lengths stay on the device. Short
sequences next to long ones cost almost nothing. Results are bit-identical whatever the other sequences are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton evaluates the annotations of its kernels and supports only constexpr.)

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .. import backends
from ..triton_runtime import on_device_of

SCAN = tl.constexpr(256)
"""Sequences that a program scans at a time to find its own."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
VARYING = ("tokens", "sequences", *(f"{x}_{of}" for x in ("q", "k", "v", "do") for of in ("token", "head")))
"""Arguments that kernels are not specialized for: they vary between batches, and 1 or 16 would recompile."""


def varlen_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax(q kᵀ / √D) v within each sequence, and the logarithms of the softmax denominators.

    q: (T, H, D), k, v: (U, H, D) in fp32, bf16 or fp16, 32 <= D <= 128 in steps of 8, any strides (views of
    a fused qkv are read in place). cu_seqlens, cu_seqlens_k: int32 (S + 1,), of the queries and of the keys.
    The maximum lengths are unused. Returns out, contiguous, of q's shape and dtype, and lse, (H, T) in fp32;
    queries without keys get 0 and -inf.
    """
    q, k, v = map(_rows_dense, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    settings = _settings(q, step=64 if 32 < q.shape[2] <= 80 else 32, warps=4)
    _launch(_forward, (q, k, v, out, lse), (cu_seqlens, cu_seqlens_k), q, (q, k, v), settings)
    return out, lse


def varlen_attention_backward_triton(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk and dv, contiguous, from the arguments and results of `varlen_attention_triton`.

    One kernel loops over the keys of a block of queries, another over the queries of a block of keys.
    """
    grad_out, q, k, v = map(_rows_dense, (grad_out, q, k, v))
    out, dim = out.contiguous(), q.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    strided = (q, k, v, grad_out)
    settings = _settings(q, step=64 if dim <= 48 else 32, warps=4)
    offsets = cu_seqlens, cu_seqlens_k
    _launch(_backward_queries, (*strided, out, lse, delta, dq), offsets, q, strided, settings)
    settings = _settings(q, step=32, warps=4 if dim <= 80 else 8)
    _launch(_backward_keys, (*strided, lse, delta, dk, dv), offsets, k, strided, settings)
    return dq, dk, dv


def column_tiles(dim: int, widest: int = 128) -> tuple[int, int]:
    """Return the widths of the two column tiles that cover `dim` <= 128; the second is 0 if one is enough."""
    single = triton.next_power_of_2(dim)
    main = min(single // 2, widest)
    rest = max(16, triton.next_power_of_2(dim - main))
    return (single, 0) if main + rest == single <= widest else (main, rest)


def _settings(q: torch.Tensor, *, step: int, warps: int) -> dict[str, Any]:
    """Return a kernel's compile-time settings; `step` and `warps` are those of bf16 and fp16."""
    dim = q.shape[2]
    exact = q.dtype == torch.float32
    main, tail = column_tiles(dim, 64 if exact else 128)
    return {
        "SCALE": 1 / math.sqrt(dim),
        "D": dim,
        "MAIN": main,
        "TAIL": tail,
        "BLOCK": 32 if exact else 64,  # rows per program
        "STEP": 32 if exact else step,  # rows of the other side at a time
        "INTERPRETED": backends.triton_is_interpreted(),
        "num_warps": (8 if dim > 32 else 4) if exact else warps,
        "num_stages": 1 if exact else 2,
    }


def _rows_dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    kernel: Any,
    tensors: tuple[torch.Tensor, ...],
    offsets: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    strided: tuple[torch.Tensor, ...],
    settings: dict[str, Any],
) -> None:
    """Launch a kernel whose programs divide `rows`, passing the strides of the tensors that may be views."""
    tokens, heads, _dim = tensors[0].shape  # of the queries
    sequences = len(offsets[0]) - 1
    strides = [stride for x in strided for stride in x.stride()[:2]]
    # A unit of 8 lets the compiler load 16 bytes at a time.
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    if rows.numel() > 0:
        with on_device_of(rows):
            kernel[rows.shape[0] // settings["BLOCK"] + sequences, heads](
                *tensors, *offsets, tokens, sequences, *(s // unit for s in strides), UNIT=unit, **settings
            )


@triton.jit(do_not_specialize=VARYING[:8])
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, tokens, sequences,
    q_token, q_head, k_token, k_head, v_token, v_head,
    UNIT: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    begin, length, first, keys_begin, keys = _place(cu_q_ptr, cu_k_ptr, sequences, BLOCK)
    if first >= length:
        return
    q_ptr += _offset(begin, q_token, q_head, UNIT)
    k_ptr += _offset(keys_begin, k_token, k_head, UNIT)
    v_ptr += _offset(keys_begin, v_token, v_head, UNIT)
    q, q_tail = _load(q_ptr, q_token * UNIT, first, length, BLOCK, D, MAIN, TAIL, INTERPRETED)
    acc = tl.zeros([BLOCK, MAIN], tl.float32)
    acc_tail = tl.zeros([BLOCK, TAIL or 16], tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)  # largest score so far, in base 2 like all below
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, keys, STEP):
        k, k_tail = _load(k_ptr, k_token * UNIT, start, keys, STEP, D, MAIN, TAIL, INTERPRETED)
        v, v_tail = _load(v_ptr, v_token * UNIT, start, keys, STEP, D, MAIN, TAIL, INTERPRETED)
        scores = _products(q, q_tail, k, k_tail, TAIL)
        scores = tl.where((start + tl.arange(0, STEP) < keys)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * (SCALE * LOG2_E))
        p = tl.exp2(scores * (SCALE * LOG2_E) - higher[:, None])
        shrink = tl.exp2(highest - higher)
        highest = higher
        total = total * shrink + tl.sum(p, 1)
        acc, acc_tail = _add_product(
            p.to(v.dtype), v, v_tail, acc * shrink[:, None], acc_tail * shrink[:, None], TAIL
        )
    divisor = tl.where(total == 0, 1.0, total)  # a row without keys is 0, not 0 / 0
    _store(
        out_ptr,
        begin,
        first,
        length,
        acc / divisor[:, None],
        acc_tail / divisor[:, None],
        D,
        MAIN,
        TAIL,
        BLOCK,
    )
    rows = first + tl.arange(0, BLOCK)
    lse = (highest + tl.log2(total)) * LN_2
    tl.store(_head_row(lse_ptr, tokens, begin) + rows, lse, mask=rows < length)


@triton.jit(do_not_specialize=VARYING)
def _backward_queries(
    q_ptr, k_ptr, v_ptr, do_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, tokens, sequences,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head,
    UNIT: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute dq of a block of queries, and delta, the row sums of dout · out, read by `_backward_keys`."""
    begin, length, first, keys_begin, keys = _place(cu_q_ptr, cu_k_ptr, sequences, BLOCK)
    if first >= length:
        return
    q_ptr += _offset(begin, q_token, q_head, UNIT)
    k_ptr += _offset(keys_begin, k_token, k_head, UNIT)
    v_ptr += _offset(keys_begin, v_token, v_head, UNIT)
    do_ptr += _offset(begin, do_token, do_head, UNIT)
    heads = tl.num_programs(1)
    out_ptr += _offset(begin, heads, 1, D)
    q, q_tail = _load(q_ptr, q_token * UNIT, first, length, BLOCK, D, MAIN, TAIL, INTERPRETED)
    do, do_tail = _load(do_ptr, do_token * UNIT, first, length, BLOCK, D, MAIN, TAIL, INTERPRETED)
    out, out_tail = _load(out_ptr, heads * D, first, length, BLOCK, D, MAIN, TAIL, INTERPRETED)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if TAIL:
        delta += tl.sum(do_tail.to(tl.float32) * out_tail.to(tl.float32), 1)
    rows = first + tl.arange(0, BLOCK)
    tl.store(_head_row(delta_ptr, tokens, begin) + rows, delta, mask=rows < length)
    lse = tl.load(_head_row(lse_ptr, tokens, begin) + rows, mask=rows < length, other=0.0) * LOG2_E
    dq = tl.zeros([BLOCK, MAIN], tl.float32)
    dq_tail = tl.zeros([BLOCK, TAIL or 16], tl.float32)
    for start in range(0, keys, STEP):
        k, k_tail = _load(k_ptr, k_token * UNIT, start, keys, STEP, D, MAIN, TAIL, INTERPRETED)
        v, v_tail = _load(v_ptr, v_token * UNIT, start, keys, STEP, D, MAIN, TAIL, INTERPRETED)
        p = tl.exp2(_products(q, q_tail, k, k_tail, TAIL) * (SCALE * LOG2_E) - lse[:, None])
        # The score of a key past the end is 0, and its p may be infinite.
        p = tl.where((start + tl.arange(0, STEP) < keys)[None, :], p, 0.0)
        ds = p * (_products(do, do_tail, v, v_tail, TAIL) - delta[:, None])
        dq, dq_tail = _add_product(ds.to(k.dtype), k, k_tail, dq, dq_tail, TAIL)
    _store(dq_ptr, begin, first, length, dq * SCALE, dq_tail * SCALE, D, MAIN, TAIL, BLOCK)


@triton.jit(do_not_specialize=VARYING)
def _backward_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, tokens, sequences,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head,
    UNIT: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of a block of keys. All tiles of scores are transposed: one row per key."""
    begin, length, first, queries_begin, queries = _place(cu_k_ptr, cu_q_ptr, sequences, BLOCK)
    if first >= length:
        return
    q_ptr += _offset(queries_begin, q_token, q_head, UNIT)
    k_ptr += _offset(begin, k_token, k_head, UNIT)
    v_ptr += _offset(begin, v_token, v_head, UNIT)
    do_ptr += _offset(queries_begin, do_token, do_head, UNIT)
    lse_ptr = _head_row(lse_ptr, tokens, queries_begin)
    delta_ptr = _head_row(delta_ptr, tokens, queries_begin)
    k, k_tail = _load(k_ptr, k_token * UNIT, first, length, BLOCK, D, MAIN, TAIL, INTERPRETED)
    v, v_tail = _load(v_ptr, v_token * UNIT, first, length, BLOCK, D, MAIN, TAIL, INTERPRETED)
    dk = tl.zeros([BLOCK, MAIN], tl.float32)
    dv = tl.zeros([BLOCK, MAIN], tl.float32)
    dk_tail = tl.zeros([BLOCK, TAIL or 16], tl.float32)
    dv_tail = tl.zeros([BLOCK, TAIL or 16], tl.float32)
    for start in range(0, queries, STEP):
        q, q_tail = _load(q_ptr, q_token * UNIT, start, queries, STEP, D, MAIN, TAIL, INTERPRETED)
        do, do_tail = _load(do_ptr, do_token * UNIT, start, queries, STEP, D, MAIN, TAIL, INTERPRETED)
        rows = start + tl.arange(0, STEP)
        # lse = inf makes p = 0 past the last query
        lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < queries, other=0.0)
        p = tl.exp2((_products(k, k_tail, q, q_tail, TAIL) * SCALE - lse[None, :]) * LOG2_E)
        ds = p * (_products(v, v_tail, do, do_tail, TAIL) - delta[None, :])
        dv, dv_tail = _add_product(p.to(do.dtype), do, do_tail, dv, dv_tail, TAIL)
        dk, dk_tail = _add_product(ds.to(q.dtype), q, q_tail, dk, dk_tail, TAIL)
    _store(dk_ptr, begin, first, length, dk * SCALE, dk_tail * SCALE, D, MAIN, TAIL, BLOCK)
    _store(dv_ptr, begin, first, length, dv, dv_tail, D, MAIN, TAIL, BLOCK)


@triton.jit
def _place(rows_ptr, others_ptr, sequences, BLOCK: tl.constexpr):
    """Return the start and length of this program's sequence, its first row in it, and the sequence's start
    and length on the other side. Both pointers are offsets (S + 1,)."""
    program = tl.program_id(0)
    sequence = 0
    for start in range(1, sequences, SCAN):
        later = start + tl.arange(0, SCAN)
        begins = tl.load(rows_ptr + later, mask=later < sequences, other=0)
        sequence += tl.sum(((begins // BLOCK + later <= program) & (later < sequences)).to(tl.int32))
    begin = tl.load(rows_ptr + sequence)
    length = tl.load(rows_ptr + sequence + 1) - begin
    others_begin = tl.load(others_ptr + sequence)
    others = tl.load(others_ptr + sequence + 1) - others_begin
    return begin, length, (program - begin // BLOCK - sequence) * BLOCK, others_begin, others


@triton.jit
def _offset(begin, token_stride, head_stride, UNIT: tl.constexpr):
    """Return the int64 offset of a sequence's first token in this program's head."""
    return (begin.to(tl.int64) * token_stride + tl.program_id(1).to(tl.int64) * head_stride) * UNIT


@triton.jit
def _head_row(ptr, tokens, begin):
    """Return a pointer to a sequence's start in this program's row of an (H, T) tensor."""
    return ptr + tl.program_id(1).to(tl.int64) * tokens + begin


@triton.jit
def _load(
    ptr, stride, first, length,
    ROWS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Load ROWS rows starting at `first`, as main tile and tail, with zeros past `length` and past D."""
    rows = first + tl.arange(0, ROWS)
    ptr += rows[:, None] * stride
    columns = tl.arange(0, MAIN)
    tile = tl.load(ptr + columns[None, :], mask=(rows < length)[:, None] & (columns < D)[None, :], other=0.0)
    tail = tile
    if TAIL:
        columns = MAIN + tl.arange(0, TAIL)
        tail = tl.load(
            ptr + columns[None, :], mask=(rows < length)[:, None] & (columns < D)[None, :], other=0.0
        )
    if INTERPRETED:  # the interpreter's bf16 arithmetic is wrong
        tile, tail = tile.to(tl.float32), tail.to(tl.float32)
    return tile, tail


@triton.jit
def _store(
    ptr, begin, first, length, tile, tail,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store the rows before `length` into this program's head of a contiguous (T, H, D) tensor."""
    heads = tl.num_programs(1)
    rows = first + tl.arange(0, ROWS)
    pointers = ptr + _offset(begin, heads, 1, D) + rows[:, None] * (heads * D)
    columns = tl.arange(0, MAIN)
    inside = (rows < length)[:, None] & (columns < D)[None, :]
    tl.store(pointers + columns[None, :], tile.to(ptr.dtype.element_ty), mask=inside)
    if TAIL:
        columns = MAIN + tl.arange(0, TAIL)
        inside = (rows < length)[:, None] & (columns < D)[None, :]
        tl.store(pointers + columns[None, :], tail.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _products(a, a_tail, b, b_tail, TAIL: tl.constexpr):
    """Return a bᵀ, over all columns."""
    products = tl.dot(a, tl.trans(b), input_precision="ieee")
    if TAIL:
        products = tl.dot(a_tail, tl.trans(b_tail), products, input_precision="ieee")
    return products


@triton.jit
def _add_product(a, b, b_tail, acc, acc_tail, TAIL: tl.constexpr):
    """Return acc + a b, for all columns."""
    acc = tl.dot(a, b, acc, input_precision="ieee")
    if TAIL:
        acc_tail = tl.dot(a, b_tail, acc_tail, input_precision="ieee")
    return acc, acc_tail
