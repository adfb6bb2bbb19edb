"""cat_fast._bindings: the CPU feature report. The packer's core is tested with its Python implementation."""

import platform
from pathlib import Path

import pytest

_bindings = pytest.importorskip("cat_fast._bindings", reason="the C++ bindings are not built")
CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists(),
    reason="compares with /proc/cpuinfo of x86-64 Linux",
)
def test_cpu_features_are_those_of_the_kernel():
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    features = _bindings.cpu_features()
    assert {"avx2", "avx512f", "avx512_bf16", "amx_tile"} <= features.keys()
    assert features == {name: name in flags for name in features}
