"""Attention with head dimension 1 in Triton, forward and backward, in time linear in the sequence length.

README.md in this folder describes the method and its error bound; triton_sums.py computes the sums. Tiles are
positions by adjacent heads, which are adjacent in memory too. There are no host synchronizations and no
atomics, so results are deterministic.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..triton_runtime import on_device_of
from .triton_sums import (
    AT_KEYS,
    AT_QUERIES,
    HEADS,
    MEAN,
    MIDDLE,
    PARAMETERS,
    SIZE,
    TERMS,
    WIDER,
    capacity_of,
    compiled_heads,
    parameters_of,
    place,
    sums,
    tabulated,
)

POSITIONS = tl.constexpr(16 * WIDER)  # per tile
SCRATCH_BYTES = 128 << 20
"""Limit of the scratch memory of a launch; samples that need more are processed in several passes."""


def scalar_attention_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return y (B, N, H), contiguous, from q, k, v of that shape and one dtype, copied unless contiguous."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    y = torch.empty_like(q)
    if q.numel() == 0:
        return y
    with on_device_of(q):
        for tensors in _passes(_scratch_bytes(q, channels=2), q, k, v, y):
            _forward(*tensors)
    return y


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor) -> None:
    """Write y."""
    parameters = parameters_of(q, k, v)
    table = tabulated(k, v, None, parameters, channels=2)
    scalar_attention_forward_kernel[_grid(q)](
        q, k, v, parameters, table, y, *_sizes(q), num_warps=8, maxnreg=64
    )


def scalar_attention_backward_triton(
    grad_y: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v, contiguous, from tensors (B, N, H), copied unless contiguous."""
    grad_y, q, k, v = grad_y.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel() == 0:
        return grad_q, grad_k, grad_v
    scratch = _scratch_bytes(q, channels=4) + 2 * 4 * q[0].numel()
    with on_device_of(q):
        for tensors in _passes(scratch, grad_y, q, k, v, grad_q, grad_k, grad_v):
            _backward(*tensors)
    return grad_q, grad_k, grad_v


def _backward(
    grad_y: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
) -> None:
    """Write grad_q, grad_k and grad_v."""
    y, grad_z = torch.empty_like(q, dtype=torch.float32), torch.empty_like(q, dtype=torch.float32)
    parameters = parameters_of(q, k, v, grad_y)
    table = tabulated(k, v, None, parameters, channels=4)
    scalar_attention_grad_queries_kernel[_grid(q)](
        grad_y, q, k, v, parameters, table, grad_q, y, grad_z, *_sizes(q), num_warps=8, maxnreg=64
    )
    del table  # the next one takes its memory
    table = tabulated(q, y, grad_z, parameters, channels=4)
    scalar_attention_grad_keys_kernel[_grid(q)](
        q, k, v, y, grad_z, parameters, table, grad_k, grad_v, *_sizes(q), num_warps=8, maxnreg=64
    )


def _scratch_bytes(x: torch.Tensor, channels: int) -> int:
    """Return the size of one sample's table."""
    return 4 * x.shape[2] * capacity_of(x) * channels * TERMS.value


def _passes(sample_bytes: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the tensors (B, N, H) in parts of as many samples as `SCRATCH_BYTES` allows, at least one."""
    samples = max(1, SCRATCH_BYTES // sample_bytes)
    return zip(*(x.split(samples) for x in tensors), strict=True)


def _grid(x: torch.Tensor) -> tuple[int, int]:
    samples, count, heads = x.shape
    return samples * triton.cdiv(heads, HEADS.value), triton.cdiv(count, POSITIONS.value)


def _sizes(x: torch.Tensor) -> tuple[int, ...]:
    return x.shape[1], *compiled_heads(x), capacity_of(x)


@triton.jit(do_not_specialize=["count", "steps", "capacity"])
def scalar_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, parameters_ptr, table_ptr, y_ptr, count, steps, STEP: tl.constexpr, capacity
):  # fmt: skip
    heads = steps * STEP
    b, h, parameters_ptr, at, inside = _tile(parameters_ptr, count, heads)
    q = tl.load(q_ptr + at, inside, other=0.0).to(tl.float32)
    z, zv = sums(
        q, k_ptr, v_ptr, None, parameters_ptr, table_ptr, b, h, count, heads, capacity, CHANNELS=2
    )  # fmt: skip
    mean = tl.load(parameters_ptr + MEAN * heads, h < heads)[None, :]
    tl.store(y_ptr + at, mean + zv / z, inside)


@triton.jit(do_not_specialize=["count", "steps", "capacity"])
def scalar_attention_grad_queries_kernel(
    grad_y_ptr, q_ptr, k_ptr, v_ptr, parameters_ptr, table_ptr, grad_q_ptr, y_ptr, grad_z_ptr,
    count, steps, STEP: tl.constexpr, capacity,
):  # fmt: skip
    """Compute dq_i = dy_i (Σ_j p_ij k_j v_j - y_i Σ_j p_ij k_j).

    Also store y minus the mean of v, and dy / Z, which dk and dv need.
    """
    heads = steps * STEP
    b, h, parameters_ptr, at, inside = _tile(parameters_ptr, count, heads)
    q = tl.load(q_ptr + at, inside, other=0.0).to(tl.float32)
    z, zv, zk, zkv = sums(
        q, k_ptr, v_ptr, None, parameters_ptr, table_ptr, b, h, count, heads, capacity, CHANNELS=4
    )  # fmt: skip
    mean = tl.load(parameters_ptr + MEAN * heads, h < heads)[None, :]
    key_size = tl.load(parameters_ptr + (AT_QUERIES + SIZE) * heads, h < heads)[None, :]
    y = zv / z
    grad_y = tl.load(grad_y_ptr + at, inside, other=0.0).to(tl.float32) + 0.0 * mean  # NaN if any input is
    tl.store(grad_q_ptr + at, grad_y * key_size * ((zkv - y * zk) / z), inside)
    tl.store(y_ptr + at, y, inside)
    tl.store(grad_z_ptr + at, grad_y / z, inside)


@triton.jit(do_not_specialize=["count", "steps", "capacity"])
def scalar_attention_grad_keys_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, grad_z_ptr, parameters_ptr, table_ptr, grad_k_ptr, grad_v_ptr,
    count, steps, STEP: tl.constexpr, capacity,
):  # fmt: skip
    """Compute dv_j = Σ_i p_ij dy_i and dk_j = v_j Σ_i p_ij dy_i q_i - Σ_i p_ij dy_i q_i y_i."""
    heads = steps * STEP
    b, h, parameters_ptr, at, inside = _tile(parameters_ptr, count, heads)
    middle = tl.load(parameters_ptr + MIDDLE * heads, h < heads)[None, :]
    k = tl.load(k_ptr + at, inside, other=0.0).to(tl.float32) - middle
    grad_v, _, gq, gqy = sums(
        k, q_ptr, y_ptr, grad_z_ptr, parameters_ptr, table_ptr, b, h, count, heads, capacity, CHANNELS=4
    )  # fmt: skip
    mean = tl.load(parameters_ptr + MEAN * heads, h < heads)[None, :]
    query_size = tl.load(parameters_ptr + (AT_KEYS + SIZE) * heads, h < heads)[None, :]
    v = tl.load(v_ptr + at, inside, other=0.0).to(tl.float32) - mean
    tl.store(grad_k_ptr + at, query_size * (v * gq - gqy), inside)
    tl.store(grad_v_ptr + at, grad_v, inside)


@triton.jit
def _tile(parameters_ptr, count, heads):
    """Return this program's sample, heads, pointer to the heads' parameters, offsets of the targets in
    (B, N, H), and the mask of targets that exist."""
    b, h = place(heads, HEADS)
    row = (tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS))[:, None]
    at = b * count * heads + row * heads + h[None, :]
    return b, h, parameters_ptr + b * PARAMETERS * heads + h, at, (row < count) & (h < heads)[None, :]
