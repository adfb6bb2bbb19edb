"""Loading of the compiled operators: once, and without failing the import if they do not load.

CAT_FAST_CPU=default|avx2|avx512 caps the instruction set of the C++ kernels, which otherwise use the best
one of the CPU. It is read when the library is loaded.
"""

import functools
import importlib.util
import os
import warnings

import torch
from packaging.version import Version

from cat_fast.errors import UserError, first_line

from . import cuda_coverage

MIN_TORCH = Version("2.10")  # the stable ABI that setup.py targets
DIFFERENTIABLE = ("group_norm_silu", "scalar_attention", "varlen_attention", "adaln", "gate_residual_adaln")
OPERATORS = {  # the operators that each library must implement
    "_ops": (*DIFFERENTIABLE, *(f"{name}_backward" for name in DIFFERENTIABLE), "pack", "unpack"),
    "_ops_cuda": tuple(
        f"{name}{suffix}"
        for name in ("group_norm_silu", "group_norm_silu_biased", "scalar_attention")
        for suffix in ("", "_backward")
    ),
}
ADDED_ARGUMENTS = {"varlen_attention": "cu_seqlens_k"}
"""Arguments that operators lack in libraries built from older sources."""
INSTRUCTION_SETS = ("default", "avx2", "avx512")
"""Targets that the C++ kernels are compiled for: the compiler's default, x86-64-v3 and x86-64-v4."""


@functools.cache
def load(name: str) -> str | None:
    """Load the operator library `name` ("_ops" or "_ops_cuda"); return None, or why it is not loaded.

    A library that does not fit the installed torch, or none of the GPUs, is rejected with one warning, and
    the next backends in the table are used instead. Raises UserError if CAT_FAST_CPU is not in
    INSTRUCTION_SETS, or if this CPU lacks it.
    """
    if (wanted := os.environ.get("CAT_FAST_CPU")) and wanted not in INSTRUCTION_SETS:
        raise UserError(
            f"CAT_FAST_CPU={wanted} is unknown: use one of {', '.join(INSTRUCTION_SETS)}, or leave it unset"
        )
    path = find(name)
    if path is None:
        return f"cat_fast.{name} is not built (pip install -e . --no-build-isolation)"
    reason = _load(name, path)
    if reason is not None:
        warnings.warn(
            f"{path} is rejected: {reason}; using other backends. Rebuild it with "
            "`pip install -e . --no-build-isolation`.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def find(name: str) -> str | None:
    """Return the path of a library, which is installed next to the package's own files."""
    spec = importlib.util.find_spec(f"cat_fast.{name}")
    return spec.origin if spec is not None else None


def instruction_set() -> str | None:
    """Return the entry of INSTRUCTION_SETS that the C++ kernels use, or None if they cannot run."""
    return torch.ops.cat_fast.instruction_set() if load("_ops") is None else None


def cuda_architectures() -> str:
    """Return the architectures that `_ops_cuda`, which is loaded, was built for: "8.0;9.0+PTX"."""
    return torch.ops.cat_fast.cuda_architectures()


def _load(name: str, path: str) -> str | None:
    installed = Version(torch.__version__)
    if installed < MIN_TORCH:
        return f"it needs torch >= {MIN_TORCH}, got {installed}"
    if name == "_ops_cuda" and (reason := load("_ops")) is not None:
        return f"it needs cat_fast._ops, which is not loaded: {reason}"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:  # built for another torch, CUDA runtime or platform
        return first_line(error)
    device = "CUDA" if name == "_ops_cuda" else "CPU"
    for operator in OPERATORS[name]:
        if not _implements(operator, device):
            return f"it was built from older sources, without the current {operator} on {device}"
    return _check_instruction_set() if name == "_ops" else _check_architectures()


def _check_instruction_set() -> str | None:
    if not hasattr(torch.ops.cat_fast, "instruction_set"):
        return "it was built from older sources, without instruction_set"
    wanted, used = os.environ.get("CAT_FAST_CPU"), torch.ops.cat_fast.instruction_set()
    if wanted and wanted != used:  # capped by the CPU
        raise UserError(
            f"CAT_FAST_CPU={wanted}: this CPU supports at most {used}: use that, or leave it unset"
        )
    return None


def _check_architectures() -> str | None:
    if not hasattr(torch.ops.cat_fast, "cuda_architectures"):
        return "it was built from older sources, without cuda_architectures"
    reasons = [
        cuda_coverage.uncovered_reason(cuda_architectures(), cuda_coverage.capability_of(i))
        for i in range(torch.cuda.device_count())
    ]
    return reasons[0] if reasons and all(reasons) else None


def _implements(operator: str, device: str) -> bool:
    qualified = f"cat_fast::{operator}"
    if not hasattr(torch.ops.cat_fast, operator):
        return False
    arguments = {argument.name for argument in torch._C._get_schema(qualified, "").arguments}
    current = operator not in ADDED_ARGUMENTS or ADDED_ARGUMENTS[operator] in arguments
    return current and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device)
