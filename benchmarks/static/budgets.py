"""Cost limits per kind of GPU kernel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from benchmarks.static.compiler import Kernel


def tolerated_spills(triton: str) -> int:
    """Return how many bytes a thread may spill with a version of Triton: none, but 24 with 3.6.

    Version 3.6 spills 8 to 24 bytes in a few kernels under their limits of registers, which 3.8 does not.
    Higher limits would cost occupancy with both.
    """
    return 24 if Version(triton) < Version("3.7") else 0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Cost limits of a kernel."""

    kind: str
    occupancy: float = 0.0
    """Minimum share of a multiprocessor's threads that fit, by registers and shared memory."""
    blocks: int = 1
    """Minimum number of blocks that fit a multiprocessor."""
    wide_access: bool = False
    """True if global memory must be accessed 16 bytes at a time."""
    matrix_instructions: bool = False
    """True if products must use matrix units: HMMA, or HGMMA on sm_90."""

    @property
    def reads_code(self) -> bool:
        """True if the budget depends on the kernel's instructions."""
        return self.wide_access or self.matrix_instructions

    def violations(self, kernel: Kernel, tolerated_spills: int = 0) -> list[str]:
        """Return descriptions of the limits that `kernel` exceeds; see `tolerated_spills`."""
        found = []
        if kernel.spill_bytes > tolerated_spills:
            found.append(f"spills {kernel.spill_bytes} bytes")
        if kernel.occupancy < self.occupancy:
            found.append(f"occupancy {kernel.occupancy:.0%} is under {self.occupancy:.0%}")
        if kernel.blocks < self.blocks:
            found.append(f"{kernel.blocks} blocks fit a multiprocessor, not {self.blocks}")
        if self.wide_access and not kernel.wide_accesses:
            found.append("no 128-bit access to global memory")
        if self.matrix_instructions:
            warpgroups = kernel.architecture >= 90
            if not (kernel.warpgroup_instructions if warpgroups else kernel.matrix_instructions):
                found.append(f"no {'HGMMA' if warpgroups else 'HMMA'} instructions")
        return found


MEMORY = Budget(kind="memory-bound", occupancy=0.5, wide_access=True)
SMALL = Budget(kind="combines partial results")
ATTENTION_FORWARD = Budget(kind="attention forward", blocks=2, wide_access=True, matrix_instructions=True)
ATTENTION_BACKWARD = Budget(kind="attention backward", blocks=1, wide_access=True, matrix_instructions=True)
ATTENTION_EXACT = Budget(kind="attention in fp32")
ARITHMETIC = Budget(kind="arithmetic-bound", occupancy=0.25)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A launcher at one size."""

    launch: Callable[[], Any]
    """Calls the launcher with meta tensors."""
    budgets: Mapping[str, Budget]
    """Budgets by the names of the kernels launched."""
