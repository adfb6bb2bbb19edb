"""The distribution of tests over workers, tests of compiled Triton kernels, the warning of a slow session."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.session import (
    LIMIT_SECONDS,
    ByFile,
    mark_compiled_triton,
    runs_triton,
    slow_session_warning,
    worker_threads,
)

ROOT = Path(__file__).parents[1]


def test_files_that_start_ranks_are_one_unit_and_every_other_file_is_its_own():
    scheduler = ByFile.__new__(ByFile)
    nodes = ["tests/demo/test_story.py::test_x[a::b]", "tests/test_launch_scripts.py::test_y"]
    assert {scheduler._split_scope(node) for node in nodes} == {"ranks"}
    assert scheduler._split_scope("tests/data/test_files.py::test_z[1]") == "tests/data/test_files.py"


def test_only_a_session_over_the_limit_is_warned_of_and_by_the_features_of_the_machine():
    assert slow_session_warning(LIMIT_SECONDS) is None
    warning = slow_session_warning(LIMIT_SECONDS * 1.5)
    assert warning.startswith("warning: the tests took 30.0 minutes, more than 20, on ")
    assert "the processor has " in warning
    assert "\n" not in warning


@pytest.mark.parametrize(("workers", "threads"), [(None, None), ("1", None), ("2", 2), ("3", 1), ("9", 1)])
def test_workers_share_the_cores(monkeypatch, workers, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(5))
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    if workers is not None:
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", workers)
    assert worker_threads() == threads


def test_a_test_that_is_parametrized_with_nothing_is_an_error(pytestconfig):
    """By default it would be skipped, whatever it was to check."""
    assert pytestconfig.getini("empty_parameter_set_mark") == "fail_at_collect"


@pytest.mark.parametrize(("on_gpu", "interpret"), [(True, None), (True, "1"), (False, "1")])
def test_triton_cases_are_gpu_tests_where_its_compiler_runs(monkeypatch, on_gpu, interpret):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    marks = {}
    names = ("test_x[triton-72]", "test_x[triton-cpu]", "test_x[cpp]", "test_triton_tiles[64]", "test_y")
    mark_compiled_triton(
        SimpleNamespace(name=name, add_marker=lambda mark, name=name: marks.update({name: mark.name}))
        for name in names
    )
    compiled = on_gpu and interpret is None
    assert marks == ({"test_x[triton-72]": "gpu", "test_x[triton-cpu]": "skip"} if compiled else {})

    def test() -> None:
        pass

    assert hasattr(runs_triton(test), "pytestmark") == compiled


def test_ordinary_tests_hide_gpus():
    """Otherwise Triton's interpreter would be off, and cases of CPU tensors would be skipped."""
    for target, hidden in (("test", True), ("test-slow", True), ("test-gpu", False)):
        command = ["make", "--dry-run", "--always-make", target]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        (line,) = [line for line in printed.splitlines() if "-m pytest" in line]
        assert line.startswith("CUDA_VISIBLE_DEVICES= ") == hidden


COLLECT = """
import sys
import pytest, tests.session
tests.session.triton_is_compiled = lambda: True
sys.exit(pytest.main(["--collect-only", "-qq", "-m", "gpu", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_the_gpu_tests_cover_what_trains_and_draws():
    command = [sys.executable, "-c", COLLECT, "tests/kernels", "tests/gpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    files = dict(re.findall(r"tests/(\S+)\.py: (\d+)", printed.stdout))
    operators = ("adaln", "group_norm_silu", "pack", "scalar_attention", "varlen_attention", "wide_attention")
    assert files.keys() >= {f"kernels/test_{name}" for name in operators}
    assert files.keys() >= {f"gpu/test_{name}" for name in ("kernels", "models", "training")}
