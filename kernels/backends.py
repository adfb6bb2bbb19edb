"""Backend selection: a table of the backends of each operator and their constraints.

The first backend in the table that accepts the arguments runs; the reference, last, accepts everything.
CAT_FAST_BACKEND=reference|cpp|triton|cuda forces one backend for every operator and raises if it cannot run.
CAT_FAST_BACKEND=adaln=triton,group_norm_silu=cuda forces a backend for these operators only.
For tests, Triton kernels also run on CPU tensors in Triton's interpreter, thousands of times slower. This
needs TRITON_INTERPRET=1 from the start of the process and a forced backend.
"""

import functools
import importlib.util
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from cat_fast.errors import UserError

from . import cuda_coverage, derivatives, library
from .varlen_attention import external

NAMES = ("reference", "cpp", "triton", "cuda", "flash3", "flash", "torch", "xformers")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of one operator, and its constraints."""

    op: str
    name: str
    """One of NAMES; "flash3", "flash", "torch" and "xformers" are kernels of other libraries."""
    device: str | None = None
    """Device type it runs on; None for any."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """Dtypes it accepts; None for any."""
    limits: Mapping[str, range] = field(default_factory=dict)
    """Sizes it accepts, keyed by the names that operators pass to `choose`."""
    library: str | None = None
    """Compiled library that contains it."""
    probe: Callable[[torch.device, torch.dtype, int], str | None] | None = None
    """For kernels of another library: returns why they cannot run on a device with a dtype and head
    dimension, or None."""
    varying_gradients: bool = False
    """True if its gradients vary from call to call, whatever torch.use_deterministic_algorithms is."""
    inference_only: str | None = None
    """Why it is not used where gradients will be computed."""
    only_forced: str | None = None
    """Why it runs only if CAT_FAST_BACKEND forces it."""

    def unavailable_reason(self) -> str | None:
        """Return why it cannot run on this machine at all, or None."""
        if self.library is not None and (reason := library.load(self.library)) is not None:
            return reason
        if self.name == "triton":
            return triton_unavailable_reason()
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return None

    def rejection_reason(
        self, device: torch.device, dtype: torch.dtype, training: bool, sizes: Mapping[str, int], forced: bool
    ) -> str | None:
        """Return the constraint violated by tensors of this device, dtype and sizes, or None."""
        if self.only_forced is not None and not forced:
            return self.only_forced
        interpreted = self.name == "triton" and forced and triton_is_interpreted()
        if self.device not in (None, device.type) and not (interpreted and device.type == "cpu"):
            return f"expected {self.device} tensors, got {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"expected {' or '.join(map(str, self.dtypes))}, got {dtype}"
        if self.inference_only is not None and training:
            return self.inference_only
        if self.varying_gradients and training and torch.are_deterministic_algorithms_enabled():
            return "its gradients are not deterministic, and torch.use_deterministic_algorithms is on"
        for name, allowed in self.limits.items():
            if sizes[name] not in allowed:
                return f"expected {name} {_format_range(allowed)}, got {sizes[name]}"
        reason = self.unavailable_reason()
        if reason is None and self.probe is not None:
            here = torch.device(device.type, device.index or 0), dtype, sizes["head_dim"]
            reason = external.failed_reason(self.name, *here) or self.probe(*here)
        if reason is None and self.library == "_ops_cuda":
            capability = cuda_coverage.capability_of(device.index or 0)
            reason = cuda_coverage.uncovered_reason(library.cuda_architectures(), capability)
        return reason

    def constraints(self) -> str:
        """Return its constraints as text: "any tensor", or device, dtypes and sizes."""
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes or ())
        sizes = [f"{name} {_format_range(allowed)}" for name, allowed in self.limits.items()]
        return "; ".join(filter(None, [self.device, dtypes, *sizes])) or "any tensor"


def _format_range(allowed: range) -> str:
    step = f" in steps of {allowed.step}" if allowed.step > 1 else ""
    return f"{allowed[0]} to {allowed[-1]}{step}"


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _standard_rows(op: str) -> tuple[Backend, ...]:
    """Return the rows of an operator with a Triton kernel for GPUs and C++ for CPUs."""
    return (
        Backend(op=op, name="triton", device="cuda", dtypes=FLOATS),
        Backend(op=op, name="cpp", device="cpu", dtypes=FLOATS, library="_ops"),
        Backend(op=op, name="reference"),
    )


_REPORTED = torch.bfloat16, 72
"""Dtype and head dimension for which `report` probes kernels of other libraries: those of DiT-XL."""
HEAD_DIMS = {"head_dim": range(32, 129, 8)}
TABLE = (
    Backend(op="group_norm_silu", name="cuda", device="cuda", dtypes=FLOATS, library="_ops_cuda"),
    *_standard_rows("group_norm_silu"),
    Backend(op="scalar_attention", name="cuda", device="cuda", dtypes=FLOATS, library="_ops_cuda"),
    *_standard_rows("scalar_attention"),
    # Kernels of other libraries, tuned for the newest GPUs.
    *(
        Backend(
            op="varlen_attention",
            name=name,
            device="cuda",
            dtypes=(torch.bfloat16, torch.float16),
            limits={"head_dim": range(8, 257, 8)},
            probe=probe,
            varying_gradients=name == "xformers",
            inference_only="its gradients would use cuDNN on values of FlashAttention"
            if name == "torch"
            else None,
        )
        for name, probe in (
            ("flash3", external.flash3_unavailable_reason),
            ("flash", external.flash_unavailable_reason),
            ("torch", external.torch_unavailable_reason),
            ("xformers", external.xformers_unavailable_reason),
        )
    ),
    Backend(op="varlen_attention", name="triton", device="cuda", dtypes=FLOATS, limits=HEAD_DIMS),
    Backend(op="varlen_attention", name="cpp", device="cpu", dtypes=FLOATS, limits=HEAD_DIMS, library="_ops"),
    Backend(op="varlen_attention", name="reference"),  # one SDPA call per run of equal lengths
    Backend(
        op="wide_attention",
        name="triton",
        device="cuda",
        dtypes=FLOATS,
        limits={"head_dim": range(256, 513, 64)},
        only_forced="not yet measured against SDPA on a GPU",
    ),
    # SDPA: CUTLASS's memory-efficient kernel on GPUs. No C++ on CPUs: SDPA reaches 0.92 to 1.13 of matmul's
    # speed there.
    Backend(op="wide_attention", name="reference"),
    *_standard_rows("adaln"),
    *_standard_rows("gate_residual_adaln"),
    *_standard_rows("pack"),  # and unpack
)


def choose(op: str, x: torch.Tensor, *, training: bool = False, **sizes: int) -> str:
    """Return the name of the backend that runs `op` on tensors of x's device and dtype, and of these sizes.

    `training`: True if gradients will be computed. Within forward-mode AD and transforms of torch.func, the
    result is "reference", the only one that they can differentiate.

    Raises UserError, naming the violated constraint, if CAT_FAST_BACKEND forces a backend that cannot run.
    torch.compile evaluates this at tracing time and treats the result as a constant.
    """
    # operator.index turns a symbolic size of torch.compile into a number.
    numbers = tuple([(name, operator.index(n)) for name, n in sizes.items()])
    return _choose(op, x.device, x.dtype, training, numbers)


@torch.compiler.assume_constant_result
def _choose(
    op: str, device: torch.device, dtype: torch.dtype, training: bool, sizes: tuple[tuple[str, int], ...]
) -> str:
    state = (
        os.environ.get("CAT_FAST_BACKEND"),
        training and torch.are_deterministic_algorithms_enabled(),
        external.number_of_failures(),
    )
    chosen = _first_that_accepts(op, device, dtype, training, sizes, state)
    return "reference" if derivatives.transformed() else chosen


@functools.cache  # the search takes longer than the launch of a small kernel
def _first_that_accepts(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    sizes: tuple[tuple[str, int], ...],
    state: tuple[object, ...],
) -> str:
    """Search the table; `state` is all that decides next to the arguments and can change in a process."""
    forced = forced_backend(op)
    for backend in TABLE:
        if backend.op != op or forced not in (None, backend.name):
            continue
        reason = backend.rejection_reason(device, dtype, training, dict(sizes), forced is not None)
        if reason is None:
            return backend.name
        if forced is not None:
            raise UserError(f"CAT_FAST_BACKEND={forced}: {op} cannot run on this backend: {reason}")
    available = ", ".join(backend.name for backend in TABLE if backend.op == op)
    raise UserError(f"CAT_FAST_BACKEND={forced}: {op} has no such backend: use one of {available}")


def forget_choices() -> None:
    """Search the table again from now on; for tests, which change what a process cannot."""
    _first_that_accepts.cache_clear()


def forced_backend(op: str) -> str | None:
    """Return the backend that CAT_FAST_BACKEND forces for `op`, or None."""
    setting = os.environ.get("CAT_FAST_BACKEND", "")
    if "=" not in setting:
        forced = {op: setting} if setting else {}
    else:
        forced = dict(part.partition("=")[::2] for part in setting.split(","))
        if unknown := forced.keys() - {backend.op for backend in TABLE}:
            raise UserError(f"CAT_FAST_BACKEND={setting}: unknown operator {min(unknown)}")
    for name in forced.values():
        if name not in NAMES:
            raise UserError(
                f"CAT_FAST_BACKEND={setting}: backend {name!r} is unknown: use one of "
                f"{', '.join(NAMES)}, or comma-separated operator=backend pairs, or leave it unset"
            )
    return forced.get(op)


def triton_is_interpreted() -> bool:
    """Return True if Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_unavailable_reason() -> str | None:
    """Return why Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not triton_is_interpreted():
        return "no CUDA device"
    return None


@dataclass(frozen=True, kw_only=True)
class Status:
    """One row of `report`."""

    op: str
    backend: str
    takes: str
    """Its constraints, as text."""
    status: str
    """"active", or the reason why it does not run."""


def report() -> list[Status]:
    """Return the table with each backend's constraints and whether it can run here."""
    rows = []
    for backend in TABLE:
        forced = forced_backend(backend.op)
        reason = backend.unavailable_reason()
        if reason is None and backend.probe is not None:
            reason = backend.probe(torch.device("cuda", torch.cuda.current_device()), *_REPORTED)
        status = reason or (None if forced else backend.only_forced) or "active"
        if forced not in (None, backend.name):
            status = f"{forced} is forced"
        rows.append(Status(op=backend.op, backend=backend.name, takes=backend.constraints(), status=status))
    return rows
