"""Compile the kernels that a Triton launcher launches, and read their costs from the binaries."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

WARP = 32
REGISTERS, THREADS = 65536, 2048
"""32-bit registers and resident threads per multiprocessor."""
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
"""Shared memory per multiprocessor, by architecture; each block uses 1 KiB in addition to its request."""
MATRIX_INSTRUCTION = re.compile(r"\bHMMA\.")
WARPGROUP_INSTRUCTION = re.compile(r"\bHGMMA\.")
"""Matrix instruction of four warps, which only Hopper has: twice the rate of HMMA there."""
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
"""An instruction in the listing of a binary, after its address and predicate."""
CLASSES = {
    "matrix": ("HMMA", "HGMMA", "IMMA", "QGMMA", "DMMA"),
    "special": ("MUFU",),
    "shuffle": ("SHFL", "REDUX"),
    "global": ("LDG", "STG", "RED", "ATOM", "UTMALDG", "UTMASTG"),
    "shared": ("LDS", "STS", "ATOMS"),
    "local": ("LDL", "STL"),
    "barrier": ("BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "SYNCS"),
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL", "FSET", "HADD2", "HMUL2", "HFMA2", "HSETP2"),
    "conversion": ("F2F", "F2FP", "F2I", "I2F", "I2FP"),
}
"""Classes of instructions by the longest of these that their names start with; all others are `other`."""
_CLASS_OF = {prefix: kind for kind, names in CLASSES.items() for prefix in names}
WIDE_ACCESS = re.compile(r"\b(?:LDG|STG|LDGSTS)\.E\S*\.128|\bUTMALDG|\bUTMASTG")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One compiled kernel."""

    name: str
    architecture: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    blocks: int
    """Blocks that fit a multiprocessor, by registers, shared memory and threads."""
    occupancy: float
    """Share of a multiprocessor's threads that these blocks use."""
    wide_accesses: int | None
    """128-bit or bulk loads and stores of global memory; None if not counted."""
    matrix_instructions: int | None
    """HMMA instructions, of one warp."""
    warpgroup_instructions: int | None
    """HGMMA instructions, of four warps; sm_90 only."""
    instructions: Mapping[str, int] | None = None
    """Instructions in the binary by class; a loop's count once. None if not counted."""


def compile_launched(
    launch: Callable[[], object],
    architecture: int,
    reads_code: Callable[[str], bool] = lambda name: True,
) -> list[Kernel]:
    """Return the kernels that `launch` launches, each once per set of arguments. Tensors may be on meta.

    `reads_code(name)` returns True if a kernel's instructions should be counted, which takes half a second.
    """
    with recording(architecture) as compiled:
        launch()
    unique = {id(kernel): kernel for kernel in compiled}
    return [examine(kernel, architecture, reads_code(kernel.metadata.name)) for kernel in unique.values()]


@contextmanager
def recording(architecture: int) -> Iterator[list[Any]]:
    """Compile and list the kernels launched inside the context, without running them."""
    compiled: list[Any] = []
    run, driver = JITFunction.run, triton.runtime.driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(_Target(architecture))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = driver


class _Target:
    """A driver that only provides the compilation target. Each architecture is a separate device, since
    Triton caches compiled kernels per device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, WARP)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def examine(compiled: Any, architecture: int, with_code: bool) -> Kernel:
    """Read a compiled kernel's costs from its binary, instructions only `with_code`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("--dump-resource-usage", cubin.name)
        code = _cuobjdump("--dump-sass", cubin.name) if with_code else None
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
    threads = compiled.metadata.num_warps * WARP
    shared = compiled.metadata.shared
    granted = -(-registers // 8) * 8 * threads
    blocks = min(REGISTERS // granted, THREADS // threads, SHARED_BYTES[architecture] // (shared + 1024))
    return Kernel(
        name=compiled.metadata.name,
        architecture=architecture,
        registers=registers,
        spill_bytes=stack,
        shared_bytes=shared,
        threads=threads,
        blocks=blocks,
        occupancy=blocks * threads / THREADS,
        wide_accesses=None if code is None else len(WIDE_ACCESS.findall(code)),
        matrix_instructions=None if code is None else len(MATRIX_INSTRUCTION.findall(code)),
        warpgroup_instructions=None if code is None else len(WARPGROUP_INSTRUCTION.findall(code)),
        instructions=None if code is None else instruction_mix(code),
    )


def instruction_mix(code: str) -> dict[str, int]:
    """Return the number of instructions by class in the listing of a binary."""
    found: Counter[str] = Counter(dict.fromkeys((*CLASSES, "other"), 0))
    for name in INSTRUCTION.findall(code):
        if name != "NOP":
            prefix = max((known for known in _CLASS_OF if name.startswith(known)), key=len, default=None)
            found["other" if prefix is None else _CLASS_OF[prefix]] += 1
    return dict(found)


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
