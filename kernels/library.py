"""Loading the compiled operators: once, and never at the price of an import that fails.

CAT_FAST_CPU=default|avx2|avx512 caps the instruction set of the C++ kernels, which otherwise run on the best
that the CPU has. It is read when the library is loaded.
"""

import functools
import importlib.util
import os
import warnings

import torch
from packaging.version import Version

from cat_fast.errors import UserError, first_line

OLDEST_TORCH = Version("2.10")  # the stable ABI that setup.py targets
DIFFERENTIABLE = ("group_norm_silu", "scalar_attention", "varlen_attention", "adaln", "gate_residual_adaln")
OPERATORS = {  # what each library of this source implements
    "_ops": (*DIFFERENTIABLE, *(f"{name}_backward" for name in DIFFERENTIABLE), "pack", "unpack"),
    "_ops_cuda": tuple(f"{name}{half}" for name in DIFFERENTIABLE[:2] for half in ("", "_backward")),
}
ADDED = {"varlen_attention": "cu_seqlens_k"}
"""Arguments that an operator of the same name lacks in libraries built from older sources."""
INSTRUCTION_SETS = ("default", "avx2", "avx512")
"""What the C++ kernels are compiled for: the compiler's default target, x86-64-v3 and x86-64-v4."""


@functools.cache
def load(name: str) -> str | None:
    """Load the operator library `name` ("_ops" or "_ops_cuda") and say why not, or None if it is loaded.

    A library that is there but does not fit the installed torch is refused with one warning; the
    reference backend then serves. Raises UserError if CAT_FAST_CPU is none of INSTRUCTION_SETS, or one that
    this CPU lacks.
    """
    if (wanted := os.environ.get("CAT_FAST_CPU")) and wanted not in INSTRUCTION_SETS:
        raise UserError(
            f"CAT_FAST_CPU={wanted} is unknown: use one of {', '.join(INSTRUCTION_SETS)}, or leave it unset"
        )
    path = find(name)
    if path is None:
        return f"cat_fast.{name} is not built (pip install -e . --no-build-isolation)"
    obstacle = _load(name, path)
    if obstacle is not None:
        warnings.warn(
            f"{path} is refused: {obstacle}; the reference backend serves. Rebuild it with "
            "`pip install -e . --no-build-isolation`.",
            RuntimeWarning,
            stacklevel=2,
        )
    return obstacle


def find(name: str) -> str | None:
    """The path of a library, which lies beside the package's own files."""
    spec = importlib.util.find_spec(f"cat_fast.{name}")
    return spec.origin if spec is not None else None


def instruction_set() -> str | None:
    """The one of INSTRUCTION_SETS that the C++ kernels run on, or None where they cannot run."""
    return torch.ops.cat_fast.instruction_set() if load("_ops") is None else None


def _load(name: str, path: str) -> str | None:
    installed = Version(torch.__version__)
    if installed < OLDEST_TORCH:
        return f"it needs torch >= {OLDEST_TORCH}, this is {installed}"
    if name == "_ops_cuda" and (obstacle := load("_ops")) is not None:
        return f"it extends cat_fast._ops, and {obstacle}"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:  # built for another torch, CUDA runtime or platform
        return first_line(error)
    device = "CUDA" if name == "_ops_cuda" else "CPU"
    for operator in OPERATORS[name]:
        if not _implements(operator, device):
            return f"it was built from other sources, without {operator} on {device} as it is now"
    return _check_instruction_set() if name == "_ops" else None


def _check_instruction_set() -> str | None:
    if not hasattr(torch.ops.cat_fast, "instruction_set"):
        return "it was built from other sources, without instruction_set"
    wanted, used = os.environ.get("CAT_FAST_CPU"), torch.ops.cat_fast.instruction_set()
    if wanted and wanted != used:  # capped to what the CPU has
        raise UserError(f"CAT_FAST_CPU={wanted}: this CPU has {used} at best: use that, or leave it unset")
    return None


def _implements(operator: str, device: str) -> bool:
    qualified = f"cat_fast::{operator}"
    if not hasattr(torch.ops.cat_fast, operator):
        return False
    arguments = {argument.name for argument in torch._C._get_schema(qualified, "").arguments}
    current = operator not in ADDED or ADDED[operator] in arguments
    return current and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device)
