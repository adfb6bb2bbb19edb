"""What the compiled CUDA code says of itself: registers, spills, vector loads. Needs no GPU."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest


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


def test_no_kernel_spills_and_half_of_the_chip_is_occupied():
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage = re.findall(pattern, cuobjdump("-res-usage"))
    assert usage
    for name, registers, stack, shared, local in usage:
        assert int(stack) == int(local) == 0, name  # neither spilled registers nor indexed arrays
        if "group_norm_silu" in name:  # limited by memory: 4 blocks of 256 threads on a multiprocessor
            assert int(registers) <= 65536 // (4 * 256), name
            assert int(shared) <= 160 * 1024 // 4, name


def test_wide_kernels_load_and_store_sixteen_bytes_at_once():
    functions = re.split(r"\n\s+Function : ", cuobjdump("-sass"))[1:]
    # By the mangled template arguments T and V; these are the kernels that walk over whole tensors.
    wide = [text for text in functions if re.search(r"(IfLi4E|Float16ELi8E)", text.split("\n")[0])]
    assert wide
    for text in wide:
        name = text.split("\n")[0]
        assert "LDG.E.128" in text, name
        if "normalize" in name or "input_gradient" in name:
            assert "STG.E.128" in text, name
