"""compute-sanitizer in the GPU check: environment, inputs and results of the tool's runs."""

import subprocess
import sys
import time

import pytest

from benchmarks.gpu import sanitizer
from benchmarks.gpu.blocks import CUDA_OPERATORS, TOOLS
from benchmarks.gpu.body import Context
from benchmarks.gpu.operators import SIZES
from benchmarks.gpu.record import RESULTS, Recorder, read_entries


@pytest.fixture
def context(tmp_path):
    record, deadline = Recorder(tmp_path / RESULTS, "sanitizer", False), time.monotonic() + 600
    return Context(record=record, dry=False, work=tmp_path, wheels=None, deadline=deadline)


def test_the_tool_sees_every_tensor_as_an_allocation(context, monkeypatch):
    """Within the blocks of torch's caching allocator, reads out of bounds would not be errors."""
    environments = []

    def run(command, *, env, **options):
        environments.append(env)
        return subprocess.CompletedProcess(command, 0, "ERROR SUMMARY: 0 errors", "")

    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(sanitizer.subprocess, "run", run)
    sanitizer.sanitizer(context)
    assert [env["PYTORCH_NO_CUDA_MEMORY_CACHING"] for env in environments] == ["1"] * len(TOOLS)
    assert all(f"{op}=cuda" in env["CAT_FAST_BACKEND"] for op in CUDA_OPERATORS for env in environments)
    assert [entry["value"] for entry in read_entries(context.record.path)] == [0] * len(TOOLS)


def test_no_tile_divides_the_inputs(monkeypatch):
    monkeypatch.setattr(sanitizer, "SIZES", {"odd": SIZES["odd"]})
    for op in CUDA_OPERATORS:
        sanitizer.call(op)
