"""Which backend runs an operator: one table of what there is and what each can take.

The first backend of the table that takes the arguments runs; the reference, last, takes everything.
CAT_FAST_BACKEND=reference|cpp|triton|cuda forces one, which then raises where it cannot.
"""

import os
from dataclasses import dataclass

import torch

from cat_fast.errors import UserError

from . import library

NAMES = ("reference", "cpp", "triton", "cuda")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of one operator, and its constraints."""

    op: str
    name: str
    """One of NAMES."""
    device: str | None = None
    """The device type it runs on; None is any."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """The dtypes it takes; None is any."""
    library: str | None = None
    """The compiled library that it lives in."""

    def missing(self) -> str | None:
        """Why it cannot run on this machine at all, or None."""
        if self.library is not None and (obstacle := library.load(self.library)) is not None:
            return obstacle
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return None

    def rejects(self, device: str, dtype: torch.dtype) -> str | None:
        """The constraint that tensors of this device type and dtype break, or None."""
        if self.device not in (None, device):
            return f"it takes {self.device} tensors, not {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {' or '.join(map(str, self.dtypes))}, not {dtype}"
        return self.missing()


TABLE = (
    Backend(
        op="group_norm_silu",
        name="cuda",
        device="cuda",
        dtypes=(torch.float32, torch.bfloat16),
        library="_ops_cuda",
    ),
    Backend(
        op="group_norm_silu",
        name="cpp",
        device="cpu",
        dtypes=(torch.float32, torch.bfloat16),
        library="_ops",
    ),
    Backend(op="group_norm_silu", name="reference"),
    Backend(
        op="scalar_attention",
        name="cpp",
        device="cpu",
        dtypes=(torch.float32, torch.bfloat16),
        library="_ops",
    ),
    Backend(op="scalar_attention", name="reference"),
    # One SDPA call for each run of equal lengths; there is no compiled backend of this operator.
    Backend(op="varlen_attention", name="reference"),
)


def choose(op: str, x: torch.Tensor) -> str:
    """The name of the backend that runs `op` on tensors of x's device and dtype.

    Raises UserError, naming the constraint, if CAT_FAST_BACKEND forces one that cannot. torch.compile
    takes the answer at tracing time as a constant.
    """
    return _choose(op, x.device.type, x.dtype)


@torch.compiler.assume_constant_result
def _choose(op: str, device: str, dtype: torch.dtype) -> str:
    forced = forced_backend()
    for backend in TABLE:
        if backend.op != op or forced not in (None, backend.name):
            continue
        obstacle = backend.rejects(device, dtype)
        if obstacle is None:
            return backend.name
        if forced is not None:
            raise UserError(f"CAT_FAST_BACKEND={forced}: {op} cannot run there: {obstacle}")
    has = ", ".join(backend.name for backend in TABLE if backend.op == op)
    raise UserError(f"CAT_FAST_BACKEND={forced}: {op} has no such backend: it has {has}")


def forced_backend() -> str | None:
    """The backend that CAT_FAST_BACKEND names, or None."""
    forced = os.environ.get("CAT_FAST_BACKEND") or None
    if forced not in (None, *NAMES):
        raise UserError(f"CAT_FAST_BACKEND={forced} is unknown: use {', '.join(NAMES)}, or leave it unset")
    return forced


def report() -> list[tuple[str, str, str]]:
    """(op, backend, status) for every row of the table: "active", or why it is not."""
    forced = forced_backend()
    rows = []
    for backend in TABLE:
        status = backend.missing() or "active"
        if forced not in (None, backend.name):
            status = f"CAT_FAST_BACKEND={forced} is set"
        rows.append((backend.op, backend.name, status))
    return rows
