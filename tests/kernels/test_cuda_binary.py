"""Registers, spills and vector loads of the compiled CUDA code. Needs no GPU."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

OPERATORS = {"group_norm_silu", "scalar_attention"}


def cuobjdump(*flags):
    spec = importlib.util.find_spec("cat_fast._ops_cuda")
    if spec is None:
        pytest.skip("the CUDA kernels are not built (nvcc and a CUDA build of torch are needed)")
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else Path()
    tool = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("needs cuobjdump, of Triton or of the CUDA toolkit")
    return subprocess.run([tool, *flags, spec.origin], capture_output=True, text=True, check=True).stdout


def test_kernels_do_not_spill_and_reach_half_occupancy():
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage = re.findall(pattern, cuobjdump("-res-usage"))
    assert {op for op in OPERATORS if any(op in name for name, *_ in usage)} == OPERATORS
    for name, registers, stack, shared, local in usage:
        assert int(stack) == int(local) == 0, name  # neither spilled registers nor indexed arrays
        assert int(registers) <= 65536 // 1024, name  # 1024 threads of 2048, in blocks of 256 or less
        assert int(shared) <= 160 * 1024 // 4, name


def functions():
    """Return the disassembly of every kernel, with its mangled name in the first line."""
    return re.split(r"\n\s+Function : ", cuobjdump("-sass"))[1:]


def test_wide_kernels_load_and_store_sixteen_bytes_at_once():
    # Found by the mangled template arguments T and V: the kernels that pass over complete tensors.
    wide = [text for text in functions() if re.search(r"(IfLi4E|Float16ELi8E)", text.split("\n")[0])]
    assert wide
    for text in wide:
        name = text.split("\n")[0]
        assert "LDG.E.128" in text, name
        if "normalize" in name or "input_gradient" in name:
            assert "STG.E.128" in text, name


def test_scalar_attention_reads_and_writes_tables_sixteen_bytes_at_once():
    kernels = [text for text in functions() if "scalar_attention" in text.split("\n")[0]]
    for kernel, wanted in (
        ("tabulate", ("LDS.128", "STG.E.128")),
        ("find_coefficients", ("LDG.E.128", "STG.E.128")),
        ("interpolate", ("LDG.E.128",)),
        ("sum_directly", ("LDS.128",)),
    ):
        texts = [text for text in kernels if kernel in text.split("\n")[0]]
        assert texts
        for text in texts:
            assert all(instruction in text for instruction in wanted), text.split("\n")[0]
