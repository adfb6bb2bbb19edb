"""adaLN over packed tokens in Triton: kernels, and the functions that launch them.

A program processes a chunk of consecutive tokens, of any sequences, one sequence after another. It finds the
first token's sequence in cu_seqlens by bisection and continues from there, so the host needs no lengths.
Forward processes tiles of two tokens where they fit into registers: twice the loads in flight, and half as
many synchronizations by reductions. A tile is within one sequence, whose last tile may be partial. In
backward, a program processes one token at a time and writes one row of partial sums per sequence that
overlaps its chunk. Chunk c and sequence s use row c + s, which is unique: from one overlapping pair to the
next, c or s grows and neither shrinks. A second kernel adds up the rows of each sequence, in order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl

from ..triton_runtime import multiprocessors, on_device_of

COMBINED_COLUMNS, COMBINED_ROWS = 64, 16
"""Columns and rows of the partial sums that a program adds up at once."""


def adaln_forward(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, cu_seqlens: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y = LayerNorm(x) * (1 + scale) + shift, and the mean and rstd of each token, (T,) fp32."""
    _x_new, y, mean, rstd = _forward(x, None, None, shift, scale, cu_seqlens, eps)
    return y, mean, rstd


def gate_residual_adaln_forward(
    x: torch.Tensor,
    h: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x_new = x + gate * h, followed by the results of `adaln_forward` on x_new; y has h's dtype."""
    return _forward(x, h, gate, shift, scale, cu_seqlens, eps)


def adaln_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, shift and scale."""
    dx, _dh, (dshift, dscale) = _backward(None, grad_y, x, None, None, scale, cu_seqlens, mean, rstd)
    return dx, dshift, dscale


def gate_residual_adaln_backward(
    grad_x_new: torch.Tensor,
    grad_y: torch.Tensor,
    x_new: torch.Tensor,
    h: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, h, gate, shift and scale."""
    dx, dh, (dshift, dscale, dgate) = _backward(
        grad_x_new, grad_y, x_new, h, gate, scale, cu_seqlens, mean, rstd
    )
    assert dh is not None
    return dx, dh, dgate, dshift, dscale


def _forward(
    x: torch.Tensor,
    h: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (x_new, y, mean, rstd). Without h and gate, x_new is x."""
    x = x.contiguous()
    tokens, features = x.shape
    x_new = x if h is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=(x if h is None else h).dtype)
    mean = x.new_empty(tokens, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tile = 2 if _fits_registers(x) else 1
    chunk = _chunk(x, waves=8, minimum=1, maximum=16)
    chunk = triton.cdiv(chunk, tile) * tile if chunk > 1 else 1  # 1: few tokens still occupy the entire GPU
    shift, scale = _rows(shift), _rows(scale)
    gate = None if gate is None else _rows(gate)
    if x.numel():
        with on_device_of(x):
            adaln_forward_kernel[(triton.cdiv(tokens, chunk),)](
                x, None if h is None else h.contiguous(), gate, shift, scale, cu_seqlens.contiguous(),
                x_new, y, mean, rstd, eps, tokens, cu_seqlens.shape[0] - 1, chunk, features,
                0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0),
                TILE=tile, BLOCK=triton.next_power_of_2(features), GATED=gate is not None,
                num_warps=_warps(x), maxnreg=_max_registers(x),
            )  # fmt: skip
    return x_new, y, mean, rstd


def _backward(
    grad_x_new: torch.Tensor | None,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
    """Return dx, dh, and the gradients of shift, scale and, if gated, gate. x is x_new of forward."""
    x, cu_seqlens = x.contiguous(), cu_seqlens.contiguous()
    tokens, features = x.shape
    sequences = cu_seqlens.shape[0] - 1
    gated = gate is not None
    dx = torch.empty_like(x)
    dh = None if h is None else torch.empty_like(x, dtype=h.dtype)
    sums = [torch.empty_like(scale, memory_format=torch.contiguous_format) for _ in range(2 + gated)]
    chunk = _chunk(x, waves=4, minimum=8, maximum=64)
    chunks = triton.cdiv(tokens, chunk)
    partial = x.new_empty((chunks + sequences, len(sums), features), dtype=torch.float32)
    scale = _rows(scale)
    gate = None if gate is None else _rows(gate)
    with on_device_of(x):
        if x.numel():
            adaln_backward_kernel[(chunks,)](
                None if grad_x_new is None else grad_x_new.contiguous(), grad_y.contiguous(), x,
                None if h is None else h.contiguous(), gate, scale, cu_seqlens, mean, rstd,
                dx, dh, partial, tokens, sequences, chunk, features,
                0 if gate is None else gate.stride(0), scale.stride(0),
                BLOCK=triton.next_power_of_2(features), GATED=gated,
                num_warps=_warps(x), maxnreg=_max_registers(x),
            )  # fmt: skip
        if sequences * features:
            adaln_combine_kernel[(sequences, triton.cdiv(features, COMBINED_COLUMNS))](
                partial, cu_seqlens, *sums, *[None] * (not gated), chunk, features,
                ROWS=COMBINED_ROWS, COLUMNS=COMBINED_COLUMNS, GATED=gated, num_warps=4,
            )  # fmt: skip
    return dx, dh, sums


def _rows(rows: torch.Tensor) -> torch.Tensor:
    """Return modulation rows with unit stride within a row, as the kernels require; copy if necessary."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _chunk(x: torch.Tensor, *, waves: int, minimum: int, maximum: int) -> int:
    """Return the tokens per program for `waves` programs per multiprocessor, clamped to the bounds."""
    return min(max(triton.cdiv(x.shape[0], waves * multiprocessors(x)), minimum), maximum)


def _warps(x: torch.Tensor) -> int:
    """Return the number of warps at which each thread handles 128 bits of a token."""
    return min(max(triton.next_power_of_2(x.shape[1]) * x.element_size() // 512, 1), 16)


def _max_registers(x: torch.Tensor) -> int | None:
    """Return the register limit per thread that gives 50 % occupancy, or None for no limit.

    Without a limit, the compiler would use more registers, although it needs no more.
    """
    return 64 if _fits_registers(x) else None


def _fits_registers(x: torch.Tensor) -> bool:
    """Return True if a thread handles 128 bits per token: two tokens then fit into 64 registers in forward,
    and one in backward.

    This depends on the width and dtype alone, so a token's result does not depend on the size of the pack.
    """
    token_bytes = x.shape[1] * x.element_size()
    return token_bytes % 16 == 0 and token_bytes <= 16 * 512


@triton.jit
def _sequence_of(token, cu_seqlens, sequences):
    """Return the last sequence that starts at or before `token`; others with the same start are empty."""
    low, high = sequences * 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        started = tl.load(cu_seqlens + middle) <= token
        low, high = tl.where(started, middle, low), tl.where(started, high, middle)
    return low


@triton.jit(do_not_specialize=["tokens", "sequences", "chunk"])
def adaln_forward_kernel(
    x, h, gate, shift, scale, cu_seqlens, x_new, y, mean, rstd, eps, tokens, sequences, chunk, features,
    gate_stride, shift_stride, scale_stride, TILE: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < features
    token = tl.program_id(0) * chunk
    end = tl.minimum(token + chunk, tokens)
    s = _sequence_of(token, cu_seqlens, sequences)
    while token < end:
        stop = tl.minimum(end, tl.load(cu_seqlens + s + 1))
        row = s.to(tl.int64)
        scale_row = tl.load(scale + row * scale_stride + columns, mask=inside, other=0).to(tl.float32)
        shift_row = tl.load(shift + row * shift_stride + columns, mask=inside, other=0).to(tl.float32)
        if GATED:
            gate_row = tl.load(gate + row * gate_stride + columns, mask=inside, other=0).to(tl.float32)
        for first in range(token, stop, TILE):
            t = (first + tl.arange(0, TILE))[:, None]  # [TILE, 1]
            exists = t < stop
            mask = exists & inside
            at = t.to(tl.int64) * features + columns
            value = tl.load(x + at, mask=mask, other=0).to(tl.float32)
            if GATED:
                value += gate_row * tl.load(h + at, mask=mask, other=0).to(tl.float32)
                stored = value.to(x_new.dtype.element_ty)  # normalize the rounded value that backward reads
                tl.store(x_new + at, stored, mask=mask)
                value = stored.to(tl.float32)
            center = tl.sum(value, 1, keep_dims=True) / features
            distance = tl.where(inside, value - center, 0.0)
            scaling = 1.0 / tl.sqrt(tl.sum(distance * distance, 1, keep_dims=True) / features + eps)
            modulated = distance * scaling * (1.0 + scale_row) + shift_row
            tl.store(y + at, modulated.to(y.dtype.element_ty), mask=mask)
            tl.store(mean + t, center, mask=exists)
            tl.store(rstd + t, scaling, mask=exists)
        token = stop
        s += 1


@triton.jit(do_not_specialize=["tokens", "sequences", "chunk"])
def adaln_backward_kernel(
    dx_new, dy, x, h, gate, scale, cu_seqlens, mean, rstd, dx, dh, partial, tokens, sequences, chunk,
    features, gate_stride, scale_stride, BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    token = tl.program_id(0) * chunk
    end = tl.minimum(token + chunk, tokens)
    s = _sequence_of(token, cu_seqlens, sequences)
    while token < end:
        stop = tl.minimum(end, tl.load(cu_seqlens + s + 1))
        row = s.to(tl.int64)
        if GATED:
            dgate = tl.zeros([BLOCK], tl.float32)
        dshift = tl.zeros([BLOCK], tl.float32)
        dscale = tl.zeros([BLOCK], tl.float32)
        for t in range(token, stop):  # in the interpreter, t is a Python int
            at = tl.cast(t, tl.int64) * features + columns
            scaling = tl.load(rstd + t)
            xhat = (tl.load(x + at, mask=inside, other=0).to(tl.float32) - tl.load(mean + t)) * scaling
            dxhat = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
            dshift += dxhat
            dscale += dxhat * xhat
            scale_row = tl.load(scale + row * scale_stride + columns, mask=inside, other=0)
            dxhat *= 1.0 + scale_row.to(tl.float32)
            along = tl.sum(dxhat * xhat, 0) / features
            gradient = scaling * (dxhat - tl.sum(dxhat, 0) / features - xhat * along)
            if GATED:
                gradient += tl.load(dx_new + at, mask=inside, other=0).to(tl.float32)
                dgate += gradient * tl.load(h + at, mask=inside, other=0).to(tl.float32)
                gate_row = tl.load(gate + row * gate_stride + columns, mask=inside, other=0)
                dh_t = gate_row.to(tl.float32) * gradient
                tl.store(dh + at, dh_t.to(dh.dtype.element_ty), mask=inside)
            tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
        kinds: tl.constexpr = 3 if GATED else 2
        sums = partial + (tl.program_id(0) + row) * kinds * features + columns
        tl.store(sums, dshift, mask=inside)
        tl.store(sums + features, dscale, mask=inside)
        if GATED:
            tl.store(sums + 2 * features, dgate, mask=inside)
        token = stop
        s += 1


@triton.jit(do_not_specialize=["chunk"])
def adaln_combine_kernel(
    partial, cu_seqlens, dshift, dscale, dgate, chunk, features,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(cu_seqlens + s), tl.load(cu_seqlens + s + 1)
    first = begin // chunk
    last = tl.where(begin < end, (end + chunk - 1) // chunk, first)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    stride = (3 if GATED else 2) * features
    sums = partial + s * stride
    to = s * features + columns
    _combine(sums, first, last, stride, columns, features, dshift + to, ROWS, COLUMNS)
    _combine(sums + features, first, last, stride, columns, features, dscale + to, ROWS, COLUMNS)
    if GATED:
        _combine(sums + 2 * features, first, last, stride, columns, features, dgate + to, ROWS, COLUMNS)


@triton.jit
def _combine(sums, first, last, stride, columns, features, to, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store into `to` the sum of the rows [first, last) of `sums`, 0 if there are none."""
    inside = columns < features
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64) * stride + columns[None, :]
        total += tl.load(sums + at, mask=(rows < last)[:, None] & inside[None, :], other=0)
    tl.store(to, tl.sum(total, 0).to(to.dtype.element_ty), mask=inside)
