"""Attention with wide heads on GPUs in Triton: forward and backward, with D split into slices.

Accumulators of 64 queries by D = 512 would take half of a multiprocessor's registers. A forward program
therefore owns 64 queries and a slice of 256 columns of v (64 KiB of accumulators), and two programs fit on a
multiprocessor. Scores need all of D: they are summed over chunks of q and k that stream through shared
memory, once per slice. D = 512 thus takes 1.5 times the multiplications; D = 256, a single slice, takes no
extra. A program with 32 queries and all of D would repeat nothing, but Hopper's matrix instructions need 64
rows.

Backward has two kernels, whose programs hold two such accumulators each. `_backward_dkdv` computes dk and dv
of 64 keys and one slice, `_backward_dq` both slices of dq of 64 queries. At D = 512 these are 6 + 3 products
of N x N x D, where one kernel with atomic additions to dq would take 5. In exchange, every sum has one owner
and one order, so results are deterministic.

D is a multiple of 64 from 256 to 512. In between, the second slice, which ends at D, overlaps the first and
stores only the columns beyond it. fp32 products are exact: without matrix units and in smaller tiles. Scores
use base 2, for which GPUs have a native exponential.
"""

import torch
import triton
import triton.language as tl

from .. import backends
from ..triton_runtime import on_device_of

SLICE = tl.constexpr(256)
LOG2_E = 1.4426950408889634
# Rows that a program owns, rows that it visits at a time, columns per chunk: as large as fit without spills.
FORWARD = {"OWNED": 64, "VISITED": 32, "CHUNK": 64, "num_warps": 4, "num_stages": 3}
BACKWARD = {"OWNED": 64, "VISITED": 32, "CHUNK": 32, "num_warps": 8, "num_stages": 3}
EXACT = {"OWNED": 32, "VISITED": 16, "CHUNK": 16, "num_warps": 8, "num_stages": 1}


def wide_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y, and for each query the base-2 logarithm of the sum of its exponentials.

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
    """Return dq, dk and dv, (B, N, H, D) and contiguous; y and lse are the results of the forward pass."""
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
    """Compute lse of OWNED queries, and one slice of the columns of y."""
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
    """Compute one slice of the columns of dk and dv, for OWNED keys."""
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
        # Queries past the end get weight 0; keys past the end are not stored.
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
    """Compute dq of OWNED queries, in two accumulators if there are two slices."""
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
    """Return this program's head (of B x H, int64), first row and slice; the slice varies fastest."""
    program = tl.program_id(0)
    blocks = tl.cdiv(N, OWNED)
    block = program // SLICES
    return (block // blocks).to(tl.int64), block % blocks * OWNED, program % SLICES


@triton.jit
def _origin(head, N, H, D: tl.constexpr):
    """Return the offset of a head's first row in (B, N, H, D)."""
    return (head // H * N * H + head % H) * D


@triton.jit
def _products(
    a, b, rows_a, rows_b, N, H,
    D: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute the inner products of rows of a and rows of b over all of D, chunk by chunk, in fp32."""
    s = tl.zeros((rows_a.shape[0], rows_b.shape[0]), tl.float32)
    for first in tl.range(0, D, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        chunk_a = _load(a, rows_a, columns, N, H, D)
        chunk_b = _load(b, rows_b, columns, N, H, D)
        s = _dot(chunk_a, tl.trans(chunk_b), s, INTERPRETED)
    return s


@triton.jit
def _load(x, rows, columns, N, H, D: tl.constexpr):
    """Load the given rows and columns of one head, with zeros past the last row."""
    return tl.load(x + rows[:, None] * (H * D) + columns[None, :], mask=rows[:, None] < N, other=0.0)


@triton.jit
def _store(x, value, rows, columns, part, N, H, D: tl.constexpr):
    """Store the given rows of one head, in the columns of slice `part` that no earlier slice contains."""
    mask = (rows[:, None] < N) & (columns[None, :] >= part * SLICE)
    tl.store(x + rows[:, None] * (H * D) + columns[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, c, INTERPRETED: tl.constexpr):
    """Return a b + c, multiplied in b's dtype; in fp32 in the interpreter, which multiplies bf16 wrongly."""
    if INTERPRETED:
        b = b.to(tl.float32)
        a = a.to(tl.float32)
    return tl.dot(a.to(b.dtype), b, c, input_precision="ieee")
