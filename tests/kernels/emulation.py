"""Helpers for tests that run CUDA C++ on the CPU, compiled with csrc/emulation."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compile_emulation(operator, output, *flags, csrc=ROOT / "csrc"):
    """Compile tests/kernels/emulated_<operator>.cpp into `output`."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("needs g++")
    source = ROOT / f"tests/kernels/emulated_{operator}.cpp"
    options = ["-O1", "-std=c++20", "-DCAT_FAST_EMULATION", f"-I{csrc}", *flags]
    subprocess.run([compiler, *options, "-x", "c++", str(source), "-o", str(output)], check=True)


def check_races(operator, folder, kernel_file, write_then_sync=None):
    """Run the program of emulated_<operator>.cpp under ThreadSanitizer and assert that it finds no race.

    `write_then_sync` is code that ends in a barrier. If given, that barrier is removed, and ThreadSanitizer
    must find the race.
    """
    csrc = shutil.copytree(ROOT / "csrc", folder / "csrc")
    if write_then_sync is not None:
        kernels = csrc / kernel_file
        assert write_then_sync in kernels.read_text()
        without, barrier = write_then_sync.rsplit("\n", 1)
        assert barrier.strip() == "__syncthreads();"
        kernels.write_text(kernels.read_text().replace(write_then_sync, without))
    compile_emulation(
        operator, folder / "check", "-fsanitize=thread", "-DRACE_CHECK", "-O0", "-g1", csrc=csrc
    )
    ran = subprocess.run([folder / "check"], capture_output=True, text=True, check=False)
    assert ("data race" in ran.stderr) == (write_then_sync is not None), ran.stderr[:2000]
    assert (ran.returncode != 0) == (write_then_sync is not None)


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())
