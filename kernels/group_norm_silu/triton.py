"""Launchers of the Triton kernels of GroupNorm + SiLU, for contiguous and channels-last memory.

Reductions are split into chunks, so that a single sample can occupy the entire GPU.
"""

from typing import NamedTuple

import torch
import triton

from ..triton_runtime import multiprocessors, on_device_of
from . import triton_kernels as kernels

TILE = 1024  # elements per program at once: 8 per thread of 4 warps, 16 bytes in half precision
ROW_BYTES = 256  # of adjacent channels, in channels-last memory
PROGRAMS_PER_MULTIPROCESSOR = 16
COMBINED = 1024  # partial results loaded at once


def group_norm_silu_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, activation: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, and the mean and rstd of each group, (N, groups) fp32. x is contiguous or channels-last."""
    y, mean, rstd, _deviation = _forward(x, weight, bias, None, groups, eps, activation)
    return y, mean, rstd


def group_norm_silu_biased_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    input_bias: torch.Tensor,
    groups: int,
    eps: float,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalize x + input_bias; return y, center, rstd and deviation.

    center: the mean of each channel's group minus input_bias; deviation: the mean of each channel minus that
    of its group; both (N, C) fp32.
    """
    y, center, rstd, deviation = _forward(x, weight, bias, input_bias, groups, eps, activation)
    assert deviation is not None
    return y, center, rstd, deviation


def group_norm_silu_backward_triton(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, weight and bias. grad_y may have another memory format than x."""
    dx, dweight, dbias, _dinput_bias = _backward(
        grad_y, x, weight, bias, None, mean, rstd, None, groups, activation
    )
    return dx, dweight, dbias


def group_norm_silu_biased_backward_triton(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    input_bias: torch.Tensor,
    center: torch.Tensor,
    rstd: torch.Tensor,
    deviation: torch.Tensor,
    groups: int,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, weight, bias and input_bias."""
    dx, dweight, dbias, dinput_bias = _backward(
        grad_y, x, weight, bias, input_bias, center, rstd, deviation, groups, activation
    )
    assert dinput_bias is not None
    return dx, dweight, dbias, dinput_bias


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    input_bias: torch.Tensor | None,
    groups: int,
    eps: float,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return y, center (without input_bias the mean of each group), rstd and, with input_bias, deviation."""
    y = torch.empty_like(x)
    rstd = x.new_zeros((x.shape[0], groups), dtype=torch.float32)
    deviation = None if input_bias is None else x.new_zeros(x.shape[:2], dtype=torch.float32)
    center = torch.zeros_like(rstd if deviation is None else deviation)
    if x.numel() == 0:
        return y, center, rstd, deviation
    input_bias = None if input_bias is None else input_bias.contiguous()
    plan = _plan(x)
    means, squares = plan.partial_results(x)
    with on_device_of(x):
        kernels.partial_moments[plan.grid](x, means, squares, *plan.sizes, *plan.strides, *plan.block)
        kernels.combine_moments[(rstd.numel(),)](
            means, squares, input_bias, center, rstd, deviation, eps, groups, *plan.sizes, COMBINED
        )
        kernels.normalize[plan.grid](
            x,
            weight.contiguous(),
            bias.contiguous(),
            center,
            rstd,
            y,
            groups,
            center.shape[1],
            *plan.sizes,
            *plan.strides,
            activation,
            *plan.block,
        )
    return y, center, rstd, deviation


def _backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    input_bias: torch.Tensor | None,
    center: torch.Tensor,
    rstd: torch.Tensor,
    deviation: torch.Tensor | None,
    groups: int,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the gradients of x, weight, bias and, if given, input_bias."""
    dx = torch.empty_like(x)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    dinput_bias = None if input_bias is None else torch.zeros_like(input_bias)
    if x.numel() == 0:
        return dx, dweight, dbias, dinput_bias
    if grad_y.stride() != x.stride():
        grad_y = torch.empty_like(x).copy_(grad_y)
    weight, bias = weight.contiguous(), bias.contiguous()
    plan = _plan(x)
    sums_dz, sums_dz_distance = plan.partial_results(x)
    mean_dz, mean_dz_xhat = torch.empty_like(rstd), torch.empty_like(rstd)
    parameters = (weight, bias, center, rstd)
    with on_device_of(x):
        kernels.partial_gradients[plan.grid](
            grad_y,
            x,
            *parameters,
            sums_dz,
            sums_dz_distance,
            groups,
            center.shape[1],
            *plan.sizes,
            *plan.strides,
            activation,
            *plan.block,
            maxnreg=64,  # 50 % occupancy, without spills
        )
        sums = (sums_dz, sums_dz_distance, rstd)
        kernels.combine_group_gradients[(rstd.numel(),)](
            *sums, weight, mean_dz, mean_dz_xhat, groups, *plan.sizes, COMBINED
        )
        kernels.combine_channel_gradients[(triton.cdiv(x.shape[1], 8),)](
            *sums, weight, mean_dz, mean_dz_xhat, deviation, dweight, dbias, dinput_bias,
            x.shape[0], groups, *plan.sizes, COMBINED // 8, 8,
        )  # fmt: skip
        kernels.input_gradient[plan.grid](
            grad_y,
            x,
            *parameters,
            mean_dz,
            mean_dz_xhat,
            dx,
            groups,
            center.shape[1],
            *plan.sizes,
            *plan.strides,
            activation,
            *plan.block,
        )
    return dx, dweight, dbias, dinput_bias


class _Plan(NamedTuple):
    """Partition of x, (N, C, *spatial), among programs."""

    sizes: tuple[int, int, int]
    """Channels, positions, and positions per chunk."""
    strides: tuple[int, int]
    """Strides in elements along channels and positions."""
    block: tuple[int, int]
    """Channels and positions of a program's tile."""
    grid: tuple[int]

    def partial_results(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        channels, positions, chunk = self.sizes
        shape = (x.shape[0], triton.cdiv(positions, chunk), channels)
        return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _plan(x: torch.Tensor) -> _Plan:
    """Plan tiles along the contiguous dimension, with chunks so large that all programs run at once."""
    samples, channels = x.shape[:2]
    positions = x[0, 0].numel()
    if x.is_contiguous() and positions > 1:
        strides = (positions, 1)
        block_p = min(triton.next_power_of_2(positions), TILE)
        block_c = min(triton.next_power_of_2(channels), TILE // block_p)
    elif positions > 1 and x.stride(1) != 1:
        raise ValueError("group_norm_silu: x must be contiguous or channels-last")
    else:
        strides = (1, channels)
        block_c = min(triton.next_power_of_2(channels), ROW_BYTES // x.element_size())
        block_p = min(triton.next_power_of_2(positions), TILE // block_c)
    columns = samples * triton.cdiv(channels, block_c)
    tiles = columns * triton.cdiv(positions, block_p)
    chunk = block_p * max(1, tiles // (PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x)))
    grid = (columns * triton.cdiv(positions, chunk),)
    return _Plan((channels, positions, chunk), strides, (block_c, block_p), grid)
