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


def test_no_kernel_wastes_registers_or_keeps_arrays_in_local_memory():
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage"))
    assert usage
    for name, registers, stack in usage:
        assert int(registers) <= 96, name  # two blocks of 256 threads on a multiprocessor at the least
        assert int(stack) <= 16, name  # a spilled scalar or two; an indexed array would take 32 and more


def test_wide_kernels_load_sixteen_bytes_at_once():
    functions = re.split(r"\n\s+Function : ", cuobjdump("-sass"))[1:]
    # By the mangled template arguments T and V; these are the kernels that walk over whole tensors.
    wide = [text for text in functions if re.search(r"(IfLi4E|BFloat16ELi8E)", text.split("\n")[0])]
    assert wide
    for text in wide:
        assert "LDG.E.128" in text, text.split("\n")[0]
