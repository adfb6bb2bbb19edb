"""Which backend runs an operator: one table of what there is and what each can take.

The first backend of the table that takes the arguments runs; the reference, last, takes everything.
CAT_FAST_BACKEND=reference|cpp|triton|cuda forces one on every operator, which then raises where it cannot;
CAT_FAST_BACKEND=adaln=triton,group_norm_silu=cuda forces operators one by one and leaves the others free.
Triton kernels also run on CPU tensors, in Triton's interpreter and thousands of times slower, where
TRITON_INTERPRET=1 was set before the start: for tests, and only forced.
"""

import functools
import importlib.util
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from cat_fast.errors import UserError

from . import library
from .varlen_attention import routes

NAMES = ("reference", "cpp", "triton", "cuda", "torch", "xformers")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of one operator, and its constraints."""

    op: str
    name: str
    """One of NAMES; "torch" and "xformers" are those libraries' own kernels."""
    device: str | None = None
    """The device type it runs on; None is any."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """The dtypes it takes; None is any."""
    limits: Mapping[str, range] = field(default_factory=dict)
    """The sizes it takes, by the name under which an operator gives them to `choose`."""
    library: str | None = None
    """The compiled library that it lives in."""
    probe: Callable[[], str | None] | None = None
    """Of another library's kernels: why they cannot run here, or None."""
    inference_only: bool = False
    """Whether its gradients are not the same bits twice, so that it serves passes without gradients."""
    only_forced: str | None = None
    """Why it runs only where CAT_FAST_BACKEND forces it."""

    def missing(self) -> str | None:
        """Why it cannot run on this machine at all, or None."""
        if self.library is not None and (obstacle := library.load(self.library)) is not None:
            return obstacle
        if self.name == "triton":
            return triton_obstacle()
        if self.probe is not None:
            return self.probe()
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return None

    def rejects(
        self, device: str, dtype: torch.dtype, training: bool, sizes: Mapping[str, int], forced: bool
    ) -> str | None:
        """The constraint that tensors of this device type, dtype and these sizes break, or None."""
        if self.only_forced is not None and not forced:
            return self.only_forced
        interpreted = self.name == "triton" and forced and triton_is_interpreted()
        if self.device not in (None, device) and not (interpreted and device == "cpu"):
            return f"it takes {self.device} tensors, not {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {' or '.join(map(str, self.dtypes))}, not {dtype}"
        if self.inference_only and training:
            return "its gradients are not the same bits twice: it serves passes without gradients"
        for name, allowed in self.limits.items():
            if sizes[name] not in allowed:
                return f"it takes {name} {_spell(allowed)}, not {sizes[name]}"
        return self.missing()

    def constraints(self) -> str:
        """What it takes, in words: "any tensor", or device, dtypes and sizes."""
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes or ())
        sizes = [f"{name} {_spell(allowed)}" for name, allowed in self.limits.items()]
        passes = "no gradients" if self.inference_only else None
        return "; ".join(filter(None, [self.device, dtypes, passes, *sizes])) or "any tensor"


def _spell(allowed: range) -> str:
    step = f" in steps of {allowed.step}" if allowed.step > 1 else ""
    return f"{allowed[0]} to {allowed[-1]}{step}"


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _three(op: str) -> tuple[Backend, ...]:
    """The rows of an operator with a Triton kernel for GPUs and C++ for CPUs."""
    return (
        Backend(op=op, name="triton", device="cuda", dtypes=FLOATS),
        Backend(op=op, name="cpp", device="cpu", dtypes=FLOATS, library="_ops"),
        Backend(op=op, name="reference"),
    )


HEAD_DIMS = {"head_dim": range(32, 129, 8)}
TABLE = (
    Backend(op="group_norm_silu", name="cuda", device="cuda", dtypes=FLOATS, library="_ops_cuda"),
    *_three("group_norm_silu"),
    Backend(op="scalar_attention", name="cuda", device="cuda", dtypes=FLOATS, library="_ops_cuda"),
    *_three("scalar_attention"),
    # Kernels of others that are tuned for the newest GPUs, but sum gradients in no fixed order.
    *(
        Backend(
            op="varlen_attention",
            name=name,
            device="cuda",
            dtypes=(torch.bfloat16, torch.float16),
            limits={"head_dim": range(8, 257, 8)},
            probe=probe,
            inference_only=True,
        )
        for name, probe in (("torch", routes.torch_obstacle), ("xformers", routes.xformers_obstacle))
    ),
    Backend(op="varlen_attention", name="triton", device="cuda", dtypes=FLOATS, limits=HEAD_DIMS),
    Backend(op="varlen_attention", name="cpp", device="cpu", dtypes=FLOATS, limits=HEAD_DIMS, library="_ops"),
    Backend(op="varlen_attention", name="reference"),  # one SDPA call for each run of equal lengths
    Backend(
        op="wide_attention",
        name="triton",
        device="cuda",
        dtypes=FLOATS,
        limits={"head_dim": range(256, 513, 64)},
        only_forced="not yet measured against SDPA on a GPU",
    ),
    # SDPA: cutlass's memory-efficient kernel on GPUs, and 0.92 to 1.13 of matmul's speed on CPUs: no C++.
    Backend(op="wide_attention", name="reference"),
    *_three("adaln"),
    *_three("gate_residual_adaln"),
    *_three("pack"),  # and unpack
)


def choose(op: str, x: torch.Tensor, *, training: bool = False, **sizes: int) -> str:
    """The name of the backend that runs `op` on tensors of x's device and dtype, and of these sizes.

    `training`: whether gradients will be asked for.

    Raises UserError, naming the constraint, if CAT_FAST_BACKEND forces one that cannot. torch.compile
    takes the answer at tracing time as a constant.
    """
    # operator.index turns a size that torch.compile keeps symbolic into a number.
    numbers = tuple((name, operator.index(n)) for name, n in sizes.items())
    return _choose(op, x.device.type, x.dtype, training, numbers)


@torch.compiler.assume_constant_result
def _choose(
    op: str, device: str, dtype: torch.dtype, training: bool, sizes: tuple[tuple[str, int], ...]
) -> str:
    forced = forced_backend(op)
    for backend in TABLE:
        if backend.op != op or forced not in (None, backend.name):
            continue
        obstacle = backend.rejects(device, dtype, training, dict(sizes), forced is not None)
        if obstacle is None:
            return backend.name
        if forced is not None:
            raise UserError(f"CAT_FAST_BACKEND={forced}: {op} cannot run there: {obstacle}")
    has = ", ".join(backend.name for backend in TABLE if backend.op == op)
    raise UserError(f"CAT_FAST_BACKEND={forced}: {op} has no such backend: it has {has}")


def forced_backend(op: str) -> str | None:
    """The backend that CAT_FAST_BACKEND forces on `op`, or None."""
    setting = os.environ.get("CAT_FAST_BACKEND", "")
    if "=" not in setting:
        forced = {op: setting} if setting else {}
    else:
        forced = dict(part.partition("=")[::2] for part in setting.split(","))
        if unknown := forced.keys() - {backend.op for backend in TABLE}:
            raise UserError(f"CAT_FAST_BACKEND={setting}: there is no operator {min(unknown)}")
    for name in forced.values():
        if name not in NAMES:
            raise UserError(
                f"CAT_FAST_BACKEND={setting}: backend {name!r} is unknown: use one of "
                f"{', '.join(NAMES)}, or operator=backend pairs with commas between, or leave it unset"
            )
    return forced.get(op)


def triton_is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_obstacle() -> str | None:
    """Why no Triton kernel can run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not triton_is_interpreted():
        return "no CUDA device"
    return None


@dataclass(frozen=True, kw_only=True)
class Status:
    """What `report` says of one row of the table."""

    op: str
    backend: str
    takes: str
    """Its constraints."""
    status: str
    """"active", or why it is not."""


def report() -> list[Status]:
    """The table, with what each backend takes and whether it can run here."""
    rows = []
    for backend in TABLE:
        forced = forced_backend(backend.op)
        status = backend.missing() or (None if forced else backend.only_forced) or "active"
        if forced not in (None, backend.name):
            status = f"{forced} is forced"
        rows.append(Status(op=backend.op, backend=backend.name, takes=backend.constraints(), status=status))
    return rows
