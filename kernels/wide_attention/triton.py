"""Attention with wide heads on GPUs in Triton: D is split, forward and backward.

64 queries by D = 512 sums would take half of a multiprocessor's registers. So a program of the forward pass
owns 64 queries and a slice of 256 columns of v, 64 KiB of sums, and two programs share a multiprocessor.
Scores need all of D: they are summed over chunks of q and k that stream through shared memory, once for each
slice, so that D = 512 takes 1.5 times the multiplications, and D = 256, one slice, no more than it must. With
32 queries and all of D a program would repeat nothing, but Hopper's matrix instructions take 64 rows.

Backward is two kernels, whose programs hold two such sums each: `_backward_dkdv` dk and dv of 64 keys and one
slice, `_backward_dq` both slices of dq of 64 queries. At D = 512 that is 6 + 3 products of N x N x D, where
one kernel that added dq up atomically would take 5: every sum has one owner and one order, so that the same
input gives the same bits.

D is a multiple of 64 from 256 to 512; between these the second slice, which ends where D does, begins within
the first and stores what lies beyond it. fp32 is multiplied exactly, on no matrix unit and in smaller tiles.
Scores are kept to base 2, as GPUs have that exponential.
"""

import torch
import triton
import triton.language as tl

from .. import backends
from ..triton_runtime import on_device_of

SLICE = tl.constexpr(256)
LOG2_E = 1.4426950408889634
# Rows that a program owns, rows that it visits at a time, columns of a chunk: large, but no register spills.
FORWARD = {"OWNED": 64, "VISITED": 32, "CHUNK": 64, "num_warps": 4, "num_stages": 3}
BACKWARD = {"OWNED": 64, "VISITED": 32, "CHUNK": 32, "num_warps": 8, "num_stages": 3}
EXACT = {"OWNED": 32, "VISITED": 16, "CHUNK": 16, "num_warps": 8, "num_stages": 1}


def wide_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and for each query the logarithm to base 2 of the sum of its exponentials.

    q, k, v: (B, N, H, D) of one dtype. Returns (B, N, H, D), contiguous, and fp32 (B, H, N).
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    B, N, H, D = q.shape
    y = torch.empty_like(q)
    lse = torch.empty((B, H, N), dtype=torch.float32, device=q.device)
    options = _options(q, FORWARD)
    programs = triton.cdiv(N, options["OWNED"]) * options["SLICES"] * B * H
    if programs:
        with on_device_of(q):
            _forward[(programs,)](q, k, v, y, lse, N, H, D**-0.5 * LOG2_E, **options)
    return y, lse


def wide_attention_backward_triton(
    grad_y: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, (B, N, H, D) and contiguous; y and lse are what the forward pass returned."""
    grad_y, q, k, v = (x.contiguous() for x in (grad_y, q, k, v))
    B, N, H, D = q.shape
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    delta = (grad_y.float() * y.float()).sum(-1).transpose(1, 2).contiguous()  # (B, H, N)
    options = _options(q, BACKWARD)
    programs = triton.cdiv(N, options["OWNED"]) * B * H
    if programs:
        inputs = (q, k, v, grad_y, lse, delta)
        sizes = (N, H, D**-0.5, D**-0.5 * LOG2_E)
        with on_device_of(q):
            _backward_dkdv[(programs * options["SLICES"],)](*inputs, dk, dv, *sizes, **options)
            _backward_dq[(programs,)](*inputs, dq, *sizes, **options)
    return dq, dk, dv


def _options(q: torch.Tensor, tiles: dict[str, int]) -> dict[str, int]:
    tiles = EXACT if q.dtype == torch.float32 else tiles
    D = q.shape[-1]
    interpreted = backends.triton_is_interpreted()
    return {**tiles, "D": D, "SLICES": triton.cdiv(D, SLICE.value), "INTERPRETED": interpreted}


@triton.jit
def _forward(
    q, k, v, y, lse, N, H, scale_log2,
    D: tl.constexpr, SLICES: tl.constexpr,
    OWNED: tl.constexpr, VISITED: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y and lse of OWNED queries, y's columns of one slice."""
    head, start, part = _place(N, OWNED, SLICES)
    origin = _origin(head, N, H, D)
    queries = start + tl.arange(0, OWNED)
    columns = part * (D - SLICE) + tl.arange(0, SLICE)
    highest = tl.full((OWNED,), float("-inf"), tl.float32)
    total = tl.zeros((OWNED,), tl.float32)
    weighted = tl.zeros((OWNED, SLICE), tl.float32)
    for first in tl.range(0, N, VISITED):
        keys = first + tl.arange(0, VISITED)
        s = _products(q + origin, k + origin, queries, keys, N, H, D, CHUNK, INTERPRETED) * scale_log2
        s = tl.where(keys[None, :] < N, s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        rows = _load(v + origin, keys, columns, N, H, D)
        weighted = _dot(p, rows, weighted * shrink[:, None], INTERPRETED)
        highest = higher
    _store(y + origin, weighted / total[:, None], queries, columns, part, N, H, D)
    tl.store(lse + head * N + queries, highest + tl.log2(total), mask=(queries < N) & (part == 0))


@triton.jit
def _backward_dkdv(
    q, k, v, grad_y, lse, delta, dk, dv, N, H, scale, scale_log2,
    D: tl.constexpr, SLICES: tl.constexpr,
    OWNED: tl.constexpr, VISITED: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dk and dv of OWNED keys, the columns of one slice."""
    head, start, part = _place(N, OWNED, SLICES)
    origin = _origin(head, N, H, D)
    keys = start + tl.arange(0, OWNED)
    columns = part * (D - SLICE) + tl.arange(0, SLICE)
    dk_sum = tl.zeros((OWNED, SLICE), tl.float32)
    dv_sum = tl.zeros((OWNED, SLICE), tl.float32)
    for first in tl.range(0, N, VISITED):
        queries = first + tl.arange(0, VISITED)
        s = _products(k + origin, q + origin, keys, queries, N, H, D, CHUNK, INTERPRETED) * scale_log2
        dp = _products(v + origin, grad_y + origin, keys, queries, N, H, D, CHUNK, INTERPRETED)
        # Queries past the end weigh nothing; keys past the end are not stored.
        p = tl.exp2(s - tl.load(lse + head * N + queries, mask=queries < N, other=float("inf"))[None, :])
        ds = p * (dp - tl.load(delta + head * N + queries, mask=queries < N, other=0.0)[None, :])
        rows = _load(grad_y + origin, queries, columns, N, H, D)
        dv_sum = _dot(p, rows, dv_sum, INTERPRETED)
        rows = _load(q + origin, queries, columns, N, H, D)
        dk_sum = _dot(ds, rows, dk_sum, INTERPRETED)
    _store(dk + origin, dk_sum * scale, keys, columns, part, N, H, D)
    _store(dv + origin, dv_sum, keys, columns, part, N, H, D)


@triton.jit
def _backward_dq(
    q, k, v, grad_y, lse, delta, dq, N, H, scale, scale_log2,
    D: tl.constexpr, SLICES: tl.constexpr,
    OWNED: tl.constexpr, VISITED: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dq of OWNED queries, in two sums where there are two slices."""
    head, start, _ = _place(N, OWNED, 1)
    origin = _origin(head, N, H, D)
    queries = start + tl.arange(0, OWNED)
    columns = tl.arange(0, SLICE)
    lse_rows = tl.load(lse + head * N + queries, mask=queries < N, other=float("inf"))
    delta_rows = tl.load(delta + head * N + queries, mask=queries < N, other=0.0)
    left = tl.zeros((OWNED, SLICE), tl.float32)
    right = tl.zeros((OWNED, SLICE), tl.float32)
    for first in tl.range(0, N, VISITED):
        keys = first + tl.arange(0, VISITED)
        s = _products(q + origin, k + origin, queries, keys, N, H, D, CHUNK, INTERPRETED) * scale_log2
        dp = _products(grad_y + origin, v + origin, queries, keys, N, H, D, CHUNK, INTERPRETED)
        p = tl.where(keys[None, :] < N, tl.exp2(s - lse_rows[:, None]), 0.0)
        ds = p * (dp - delta_rows[:, None])
        left = _dot(ds, _load(k + origin, keys, columns, N, H, D), left, INTERPRETED)
        if SLICES == 2:
            right = _dot(ds, _load(k + origin, keys, columns + (D - SLICE), N, H, D), right, INTERPRETED)
    _store(dq + origin, left * scale, queries, columns, 0, N, H, D)
    if SLICES == 2:
        _store(dq + origin, right * scale, queries, columns + (D - SLICE), 1, N, H, D)


@triton.jit
def _place(N, OWNED: tl.constexpr, SLICES: tl.constexpr):
    """Of this program: its head (of B x H, 64 bits), its first row and its slice; slices are neighbours."""
    program = tl.program_id(0)
    blocks = tl.cdiv(N, OWNED)
    block = program // SLICES
    return (block // blocks).to(tl.int64), block % blocks * OWNED, program % SLICES


@triton.jit
def _origin(head, N, H, D: tl.constexpr):
    """Where a head's first row begins in (B, N, H, D)."""
    return (head // H * N * H + head % H) * D


@triton.jit
def _products(
    a, b, rows_a, rows_b, N, H,
    D: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The inner products of rows of a with rows of b over all of D, chunk by chunk, in fp32."""
    s = tl.zeros((rows_a.shape[0], rows_b.shape[0]), tl.float32)
    for first in tl.range(0, D, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        chunk_a = _load(a, rows_a, columns, N, H, D)
        chunk_b = _load(b, rows_b, columns, N, H, D)
        s = _dot(chunk_a, tl.trans(chunk_b), s, INTERPRETED)
    return s


@triton.jit
def _load(x, rows, columns, N, H, D: tl.constexpr):
    """Columns of rows of one head, zero past the last row."""
    return tl.load(x + rows[:, None] * (H * D) + columns[None, :], mask=rows[:, None] < N, other=0.0)


@triton.jit
def _store(x, value, rows, columns, part, N, H, D: tl.constexpr):
    """Columns of rows of one head, as far as they are in slice `part` and in none before."""
    mask = (rows[:, None] < N) & (columns[None, :] >= part * SLICE)
    tl.store(x + rows[:, None] * (H * D) + columns[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, c, INTERPRETED: tl.constexpr):
    """a b + c, multiplied in b's dtype; in fp32 by the interpreter, which multiplies raw bf16 wrongly."""
    if INTERPRETED:
        b = b.to(tl.float32)
        a = a.to(tl.float32)
    return tl.dot(a.to(b.dtype), b, c, input_precision="ieee")
