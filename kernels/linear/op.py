"""y = x Wᵀ + b by torch, whose products on CPUs are MKL's, or by oneDNN, which some processors run faster.

MKL uses narrower instructions on AMD processors than these have. The choice holds for the process and is
recorded by runs, their checkpoints and drawn images, because the libraries round differently; a layer may
have its own. It is for fp32 on CPUs; everything else, and compiled graphs, use torch.

Shapes: (..., K) x (N, K) -> (..., N).
"""

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from cat_fast.errors import UserError
from cat_fast.processor import is_amd

from .. import derivatives

BACKENDS = ("mkl", "onednn")
DEFAULT = BACKENDS[0]
"""Torch's own."""
SETTINGS = ("auto", *BACKENDS)
"""`auto` measures both and takes oneDNN if it is clearly faster."""
CLEARLY_FASTER = 1.15
"""Ratio of speeds at which `auto` leaves torch's default."""
_CALIBRATION = ((1024, 192, 768), (1024, 768, 192), (256, 384, 1152))
"""Rows, inputs and outputs of the products that are measured."""
_ROUNDS = 20
_SMALLEST_CONVOLUTION = 20480
"""Elements up to which torch computes the convolution of one image without oneDNN."""


class _Process:
    backend = DEFAULT


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """Compute y = x Wᵀ + b, (..., N), for x (..., K), weight (N, K) and bias (N,), of one dtype.

    Derivatives beyond gradients are computed through torch's operator.

    Args:
        backend: one of `BACKENDS`; by default that of the process.
    """
    if (backend or _Process.backend) == DEFAULT or not _takes(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def selected() -> str:
    """Return the library of fp32 products on CPUs in this process, one of `BACKENDS`."""
    return _Process.backend


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Select the library of fp32 products on CPUs within a block, for all threads.

    Raises:
        UserError: unknown name, or a torch without oneDNN.
    """
    before, _Process.backend = _Process.backend, require(backend)
    try:
        yield
    finally:
        _Process.backend = before


def require(backend: str) -> str:
    """Return a name of `BACKENDS`.

    Raises:
        UserError: unknown name, or a torch without oneDNN.
    """
    if backend not in BACKENDS:
        raise UserError(f"linear_backend: expected {' or '.join(BACKENDS)}, got {backend!r}")
    if backend == "onednn" and (reason := unavailable_reason()):
        raise UserError(f"linear_backend: onednn is not available: {reason}; use mkl")
    return backend


def unavailable_reason() -> str | None:
    """Return why oneDNN's products cannot be used, or None."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"torch {torch.__version__} was built without oneDNN"
    return None


def calibrate() -> str:
    """Return the faster library on this machine, with the present number of threads.

    Compares the shortest times over alternating rounds, which other processes disturb the least.
    """
    if unavailable_reason():
        return DEFAULT
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for rows, inputs, outputs in _CALIBRATION:
        x, weight = (torch.randn(size, inputs, generator=generator) for size in (rows, outputs))
        shortest = dict.fromkeys(BACKENDS, math.inf)
        for _ in range(_ROUNDS):
            for name in BACKENDS:
                with torch.no_grad(), using(name):
                    start = time.perf_counter()
                    linear(x, weight)
                    shortest[name] = min(shortest[name], time.perf_counter() - start)
        ratios.append(shortest["mkl"] / shortest["onednn"])
    return "onednn" if statistics.median(ratios) > CLEARLY_FASTER else DEFAULT


@cache
def processor_backend() -> str:
    """Return oneDNN on AMD processors, otherwise torch's default.

    Depends on the machine only, unlike `calibrate`, so that all processes of a machine round alike.
    """
    return "onednn" if is_amd() and unavailable_reason() is None else DEFAULT


def resolve(setting: str) -> str:
    """Return the library for a value of `SETTINGS`; `auto` is measured.

    Raises:
        UserError: unknown value, or a torch without oneDNN.
    """
    if setting == "auto":
        return calibrate()
    if setting not in SETTINGS:
        raise UserError(f"linear_backend: expected {', '.join(SETTINGS)}, got {setting!r}")
    return require(setting)


def _takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not derivatives.transformed()
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        differentiable = derivatives.beyond_first()
        product = F.linear if differentiable else _product
        weight_grad = None
        if needs_weight:
            weight_grad = grads.t() @ rows if differentiable else _weight_gradient(grads, rows, weight)
        return (
            product(grad, weight.t(), None) if needs_x else None,
            weight_grad,
            grads.sum(0) if needs_bias else None,
        )


def _weight_gradient(grads: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return Gᵀ X, (N, K), of gradients (M, N) and rows (M, K): that of a 1 x 1 convolution over a column.

    oneDNN's matrix product would first rearrange an operand, which takes up to as long as the product.
    """
    if rows.numel() <= _SMALLEST_CONVOLUTION:
        return _product(grads.t(), rows.t(), None)
    grad_column, column = (m.contiguous()[None, :, None].permute(0, 3, 1, 2) for m in (grads, rows))
    sizes = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "output_padding": [0, 0], "groups": 1}
    _, gradient, _ = torch.ops.aten.convolution_backward(
        grad_column,
        column,
        weight[:, :, None, None],
        bias_sizes=None,
        transposed=False,
        output_mask=[False, True, False],
        **sizes,
    )
    return gradient.flatten(1)
