"""Sums over sources s of e^(t s) for many targets t in Triton, in linear time.

Blocks and reach are those of README.md in this folder, but the table holds moments instead of values at
nodes. A block's sums of e^(t s) = e^(centre s) e^((t - centre) s) are tabulated as the moments
Σ e^(centre s) s^m, m < 8. Each is multiplied by the coefficient of z^m in the polynomial that interpolates
e^z at the 8 Chebyshev nodes of |z| <= reach. A polynomial of the product z = (t - centre) s has the error
bound of one in t alone, and its powers of s and of t - centre separate. A source therefore costs one
exponential per block and no others, and a target adds up 8 terms.

Each head has its own number of blocks, determined on the GPU: programs process as many as their heads need.
Heads without a table compute the same sums term by term.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.polynomial import Chebyshev, Polynomial

from ..backends import triton_is_interpreted
from ..triton_runtime import multiprocessors

REACH = tl.constexpr(0.8)
"""Maximum of |t - centre| |s| in a block; it gives each term a relative error of 1.6e-7 before rounding."""
TERMS = tl.constexpr(8)
_INTERPOLANT = Chebyshev.interpolate(np.exp, TERMS.value - 1, (-REACH.value, REACH.value))
COEFFICIENTS = tl.constexpr(tuple(_INTERPOLANT.convert(kind=Polynomial).coef.tolist()))
MAX_BLOCKS = 512

WIDER = 16 if triton_is_interpreted() else 1  # the interpreter's time does not depend on the tile size
HEADS = tl.constexpr(16)  # per tile
SOURCES = tl.constexpr(16 * WIDER)  # per tile
DIRECT = tl.constexpr(2 * WIDER)  # sources per iteration of the direct sums
BLOCKS = tl.constexpr(2 * WIDER)  # tabulated at once by a program, which share the sources in the L1 cache
WIDE_HEADS, WIDE_ROWS = tl.constexpr(64), tl.constexpr(16)  # of a tile that is only read
MAX_SPLITS = tl.constexpr(64)

# Parameters of each head: the middle of the range of its keys and the mean of its values. Then, for sums at
# queries and for sums at keys: the start of the first block of targets, the blocks' width and number, and the
# largest |source|.
MIDDLE, MEAN, AT_QUERIES, AT_KEYS = (tl.constexpr(row) for row in (0, 1, 2, 6))
LOW, WIDTH, COUNT, SIZE = (tl.constexpr(row) for row in range(4))
PARAMETERS = tl.constexpr(10)


def compiled_heads(x: torch.Tensor) -> tuple[int, int]:
    """Return the number of heads as a product: kernels are compiled for the second factor, the number of
    heads that they access at once."""
    step = 8 if x.shape[2] % 8 == 0 else 1
    return x.shape[2] // step, step


def capacity_of(x: torch.Tensor) -> int:
    """Return the maximum number of blocks of a head.

    Beyond a fraction of the sources, tabulation saves little. The table, whose size must not depend on the
    data, would be many times as large as x.
    """
    return max(1, min(MAX_BLOCKS, x.shape[1] // 8))


def parameters_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_y: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the heads' parameters, (B, PARAMETERS, H) in fp32, from tensors (B, N, H)."""
    samples, count, heads = q.shape
    tiles = samples * triton.cdiv(heads, WIDE_HEADS.value)
    splits = min(triton.cdiv(8 * multiprocessors(q), tiles), MAX_SPLITS.value, triton.cdiv(count, 64))
    tensors = 3 if grad_y is None else 4
    partials = q.new_empty((samples, splits, 3 * tensors, heads), dtype=torch.float32)
    parameters = q.new_empty((samples, PARAMETERS.value, heads), dtype=torch.float32)
    scalar_attention_statistics_kernel[tiles, splits](
        q, k, v, grad_y, partials, count, *compiled_heads(q), tensors, num_warps=4
    )
    scalar_attention_parameters_kernel[samples * triton.cdiv(heads, HEADS.value),](
        partials, parameters, count, splits, *compiled_heads(q), capacity_of(q), tensors, num_warps=4
    )
    return parameters


def tabulated(
    sources: torch.Tensor,
    values: torch.Tensor,
    weights: torch.Tensor | None,
    parameters: torch.Tensor,
    channels: int,
) -> torch.Tensor:
    """Return the table (B, H, capacity, channels, TERMS) that `sums` reads.

    Sources are keys, without weights, or queries, with weights. Only the blocks that a head needs are
    written.
    """
    samples, count, heads = sources.shape
    capacity = capacity_of(sources)
    table = sources.new_empty((samples, heads, capacity, channels, TERMS.value), dtype=torch.float32)
    tiles = samples * triton.cdiv(heads, HEADS.value)
    walkers = min(triton.cdiv(16 * multiprocessors(sources), tiles), triton.cdiv(capacity, BLOCKS.value))
    scalar_attention_tabulate_kernel[tiles, walkers](
        sources, values, weights, parameters, table, count, *compiled_heads(sources), capacity,
        CHANNELS=channels, num_warps=8,
    )  # fmt: skip
    return table


@triton.jit(do_not_specialize=["count", "steps"])
def scalar_attention_statistics_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, partials_ptr, count, steps, STEP: tl.constexpr, TENSORS: tl.constexpr
):  # fmt: skip
    """Compute each head's minimum, maximum and sum in every tensor, over the rows of one split."""
    heads = steps * STEP
    b, h = place(heads, WIDE_HEADS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    rows = tl.cdiv(count, splits)
    first = split * rows
    last = tl.minimum(first + rows, count)
    start = b * count * heads
    partials_ptr += (b * splits + split) * (3 * TENSORS) * heads + h
    _columns(q_ptr + start, first, last, h, heads, partials_ptr)
    _columns(k_ptr + start, first, last, h, heads, partials_ptr + 3 * heads)
    _columns(v_ptr + start, first, last, h, heads, partials_ptr + 6 * heads)
    if TENSORS == 4:
        _columns(grad_ptr + start, first, last, h, heads, partials_ptr + 9 * heads)


@triton.jit
def place(heads, WIDTH: tl.constexpr):
    """Return the sample and the heads of this program's tile of `WIDTH`."""
    tiles = tl.cdiv(heads, WIDTH)
    program = tl.program_id(0)
    return (program // tiles).to(tl.int64), program % tiles * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def _columns(x_ptr, first, last, h, heads, partials_ptr):
    """Store the minimum, the maximum and the sum of heads h in rows from `first` to `last`."""
    low = tl.full([WIDE_ROWS, WIDE_HEADS], float("inf"), tl.float32)
    high = -low
    total = tl.full([WIDE_ROWS, WIDE_HEADS], 0.0, tl.float32)
    for start in range(first, last, WIDE_ROWS):
        row = start + tl.arange(0, WIDE_ROWS)[:, None]
        at = tl.minimum(row, last - 1) * heads + h[None, :]  # repeating the last row changes no range
        x = tl.load(x_ptr + at, (h < heads)[None, :], other=0.0).to(tl.float32)
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
        total += tl.where(row < last, x, 0.0)
    tl.store(partials_ptr, tl.min(low, 0), h < heads)
    tl.store(partials_ptr + heads, tl.max(high, 0), h < heads)
    tl.store(partials_ptr + 2 * heads, tl.sum(total, 0), h < heads)


@triton.jit(do_not_specialize=["count", "splits", "steps", "capacity"])
def scalar_attention_parameters_kernel(
    partials_ptr, parameters_ptr, count, splits, steps, STEP: tl.constexpr, capacity, TENSORS: tl.constexpr
):  # fmt: skip
    """Compute each head's parameters from the statistics of all splits.

    A head with non-finite values gets one block and a mean of NaN, which propagates to all of its results.
    """
    heads = steps * STEP
    b, h = place(heads, HEADS)
    split = tl.arange(0, MAX_SPLITS)[:, None]
    inside = (split < splits) & (h < heads)[None, :]
    at = partials_ptr + (b * splits + split) * (3 * TENSORS) * heads + h[None, :]
    mean = tl.sum(tl.load(at + 8 * heads, inside, other=0.0), 0) / count
    for tensor in tl.static_range(TENSORS):
        mean += 0.0 * tl.sum(tl.load(at + (3 * tensor + 2) * heads, inside, other=0.0), 0)
    finite = mean == mean
    q_low = tl.where(finite, tl.min(tl.load(at, inside, other=float("inf")), 0), 0.0)
    q_high = tl.where(finite, tl.max(tl.load(at + heads, inside, other=float("-inf")), 0), 0.0)
    k_low = tl.where(finite, tl.min(tl.load(at + 3 * heads, inside, other=float("inf")), 0), 0.0)
    k_high = tl.where(finite, tl.max(tl.load(at + 4 * heads, inside, other=float("-inf")), 0), 0.0)
    middle = 0.5 * k_low + 0.5 * k_high
    coarse = 4096.0 * (k_high - k_low)
    middle = (middle + coarse) - coarse  # rounded to few digits, so that key - middle is exact for most keys
    k_low -= middle
    k_high -= middle
    at = parameters_ptr + b * PARAMETERS * heads + h
    tl.store(at + MIDDLE * heads, middle, h < heads)
    tl.store(at + MEAN * heads, mean, h < heads)
    _store_blocks(at + AT_QUERIES * heads, q_low, q_high, tl.maximum(-k_low, k_high), h, heads, capacity)
    _store_blocks(at + AT_KEYS * heads, k_low, k_high, tl.maximum(-q_low, q_high), h, heads, capacity)


@triton.jit
def _store_blocks(at, low, high, size, h, heads, capacity):
    """Store the blocks of targets from low to high; their number is 0 if it would exceed the capacity."""
    blocks = tl.maximum(tl.ceil((high - low) * size / (2.0 * REACH)), 1.0)
    blocks = tl.where(blocks <= capacity, blocks, 0.0)
    tl.store(at + LOW * heads, low, h < heads)
    tl.store(at + WIDTH * heads, tl.where(blocks > 0.0, (high - low) / blocks, 0.0), h < heads)
    tl.store(at + COUNT * heads, blocks, h < heads)
    tl.store(at + SIZE * heads, size, h < heads)


@triton.jit
def _load_blocks(at, h, heads):
    """Load low, width, blocks and size, with 0 blocks for heads past the last."""
    low = tl.load(at + LOW * heads, h < heads, other=0.0)
    width = tl.load(at + WIDTH * heads, h < heads, other=0.0)
    blocks = tl.load(at + COUNT * heads, h < heads, other=0.0)
    return low, width, blocks, tl.load(at + SIZE * heads, h < heads, other=0.0)


@triton.jit
def _sources(source_ptr, value_ptr, weight_ptr, at, inside, target, middle, mean, scale, key_size):
    """Return (e^(q k - |q| key_size) * weight, source / size, lever, value) of sources at targets.

    Exponents are at most 0, since |k| <= key_size, and near 0 they are as exact as k. The lever is source /
    size again, but keys are measured from about their mean under the exponential weights (in units of size,
    x / (4 + |x|) for typical data). Covariances with the lever keep more digits."""
    source = tl.load(source_ptr + at, inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + at, inside, other=0.0).to(tl.float32)
    if weight_ptr is None:
        source -= middle
        value -= mean
        term = tl.exp(tl.abs(target) * (tl.where(target < 0.0, -source, source) - key_size))
        source *= scale
        x = target * key_size
        lever = source - x / (4.0 + tl.abs(x))
    else:
        term = tl.exp(tl.abs(source) * (tl.where(source < 0.0, -target, target) - key_size))
        term *= tl.load(weight_ptr + at, inside, other=0.0)
        source *= scale
        lever = source
    return tl.where(inside, term, 0.0), source, lever, value


@triton.jit(do_not_specialize=["count", "steps", "capacity"])
def scalar_attention_tabulate_kernel(
    source_ptr, value_ptr, weight_ptr, parameters_ptr, table_ptr, count, steps, STEP: tl.constexpr, capacity,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Tabulate the moments of all sources about the centres of blocks."""
    heads = steps * STEP
    tiles = tl.cdiv(heads, HEADS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.arange(0, BLOCKS * HEADS)
    h = tl.program_id(0) % tiles * HEADS + column % HEADS
    parameters_ptr += b * PARAMETERS * heads + h
    TARGETS: tl.constexpr = AT_QUERIES if weight_ptr is None else AT_KEYS
    low, width, blocks, size = _load_blocks(parameters_ptr + TARGETS * heads, h, heads)
    key_size = tl.load(parameters_ptr + (AT_QUERIES + SIZE) * heads, h < heads, other=0.0)[None, :]
    middle = tl.load(parameters_ptr + MIDDLE * heads, h < heads, other=0.0)[None, :]
    mean = tl.load(parameters_ptr + MEAN * heads, h < heads, other=0.0)[None, :]
    scale = 1.0 / tl.maximum(size, 1e-30)[None, :]
    max_blocks = tl.max(blocks).to(tl.int32)
    for first in range(tl.program_id(1) * BLOCKS, max_blocks, tl.num_programs(1) * BLOCKS):
        block = (first + column // HEADS).to(tl.float32)
        centre = tl.fma(tl.minimum(block, blocks - 1.0) + 0.5, width, low)[None, :]
        moments = ()
        for _ in tl.static_range(TERMS * CHANNELS):
            moments += (tl.full([SOURCES, BLOCKS * HEADS], 0.0, tl.float32),)
        for n in range(0, count, SOURCES):
            row = n + tl.arange(0, SOURCES)[:, None]
            inside = (row < count) & (h < heads)[None, :]
            at = b * count * heads + row * heads + h[None, :]
            term, source, lever, value = _sources(
                source_ptr, value_ptr, weight_ptr, at, inside, centre, middle, mean, scale, key_size
            )  # fmt: skip
            more = ()
            for m in tl.static_range(TERMS):
                more += (moments[CHANNELS * m] + term, moments[CHANNELS * m + 1] + term * value)
                if CHANNELS == 4:
                    levered = term * lever
                    more += (moments[4 * m + 2] + levered, moments[4 * m + 3] + levered * value)
                term *= source
            moments = more
        entry_ptr = table_ptr + ((b * heads + h) * capacity + block.to(tl.int32)) * (CHANNELS * TERMS)
        for m in tl.static_range(TERMS):
            for c in tl.static_range(CHANNELS):
                moment = COEFFICIENTS[m] * tl.sum(moments[CHANNELS * m + c], 0)
                tl.store(entry_ptr + (c * TERMS + m), moment, block < blocks)


@triton.jit
def sums(
    target, source_ptr, value_ptr, weight_ptr, parameters_ptr, table_ptr, b, h, count, heads, capacity,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute sums at targets [positions, heads] over keys, or over queries if there are weights.

    The terms are e^(q k - |q| S) * weight, that times value, and both times lever (`_sources`), where S is
    the largest |k|. Keys are shifted by the middle of their range, their values by their mean."""
    TARGETS: tl.constexpr = AT_QUERIES if weight_ptr is None else AT_KEYS
    low, width, blocks, size = _load_blocks(parameters_ptr + TARGETS * heads, h, heads)
    key_size = tl.load(parameters_ptr + (AT_QUERIES + SIZE) * heads, h < heads, other=0.0)
    middle = tl.load(parameters_ptr + MIDDLE * heads, h < heads, other=0.0)[None, :, None]
    mean = tl.load(parameters_ptr + MEAN * heads, h < heads, other=0.0)[None, :, None]
    scale = 1.0 / tl.maximum(size, 1e-30)[None, :, None]
    m = tl.arange(0, TERMS)[None, None, :]

    block = tl.minimum((target - low[None, :]) / tl.maximum(width, 1e-30)[None, :], blocks[None, :] - 1.0)
    block = tl.maximum(block, 0.0).to(tl.int32)
    centre = tl.fma(block.to(tl.float32) + 0.5, width[None, :], low[None, :])  # bit-identical to the table's
    x = ((target - centre) * size[None, :])[:, :, None]
    powers = tl.where((m & 1) != 0, x, 1.0) * tl.where((m & 2) != 0, x * x, 1.0)
    powers *= tl.where((m & 4) != 0, (x * x) * (x * x), 1.0)
    factor = 1.0
    if weight_ptr is None:
        factor = tl.exp((tl.abs(centre) - tl.abs(target)) * key_size[None, :])
    entry_ptr = table_ptr + b * heads * capacity * (CHANNELS * TERMS)
    entry_ptr += ((h[None, :] * capacity + block) * (CHANNELS * TERMS))[:, :, None] + m
    by_table = ()
    for c in tl.static_range(CHANNELS):
        entries = tl.load(entry_ptr + c * TERMS, (blocks > 0.0)[None, :, None], other=0.0)
        by_table += (tl.sum(entries * powers, 2) * factor,)

    direct = (blocks == 0.0) & (h < heads)
    term_by_term = ()
    for _ in tl.static_range(CHANNELS):
        term_by_term += (tl.full(target.shape, 0.0, tl.float32),)
    for n in range(0, tl.max(tl.where(direct, count, 0)), DIRECT):
        row = n + tl.arange(0, DIRECT)[None, None, :]
        inside = (row < count) & direct[None, :, None]
        at = b * count * heads + row * heads + h[None, :, None]
        term, _source, lever, value = _sources(
            source_ptr, value_ptr, weight_ptr, at, inside, target[:, :, None], middle, mean,
            scale, key_size[None, :, None],
        )  # fmt: skip
        more = ()
        for c in tl.static_range(CHANNELS // 2):
            more += (term_by_term[2 * c] + tl.sum(term, 2), term_by_term[2 * c + 1] + tl.sum(term * value, 2))
            term *= lever
        term_by_term = more

    chosen = ()
    for c in tl.static_range(CHANNELS):
        chosen += (tl.where(direct[None, :], term_by_term[c], by_table[c]),)
    return chosen
