"""The Triton kernels, compiled for sm_80 and sm_90 without a GPU, stay within their budgets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_static
from benchmarks.gate import expected
from benchmarks.shared.committed import committed
from benchmarks.shared.compact_json import write_compact
from benchmarks.static.budgets import Budget, tolerated_spills
from benchmarks.static.compiler import Kernel
from benchmarks.static.report import kernels_of, read_kernels, to_report

ROOT = Path(__file__).parents[2]
FRUGAL = Kernel(
    name="k",
    architecture=80,
    registers=32,
    spill_bytes=0,
    shared_bytes=0,
    threads=128,
    blocks=16,
    occupancy=1.0,
    wide_accesses=2,
    matrix_instructions=0,
    warpgroup_instructions=0,
)


def compile_all(tmp_path, *options):
    """Compile in a separate process, because Triton may interpret kernels in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = tmp_path / "static.json"
    command = [sys.executable, "-m", "benchmarks.gpu_static", "--json", path, *options]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert path.exists(), ran.stderr[-2000:]
    return ran, json.loads(path.read_text())


@pytest.mark.parametrize("option", ["--alternate", pytest.param(None, marks=pytest.mark.slow)])
def test_every_triton_kernel_stays_within_its_budget(tmp_path, option):
    """Compile every case for alternating architectures, or (slow) for both: reading a binary is slow.

    Registers and spills are those of benchmarks/expected.json, if it lists this version of Triton.
    """
    ran, report = compile_all(tmp_path, *([option] if option else []))
    assert ran.returncode == 0, ran.stdout
    kernels = kernels_of(report)
    assert not [row for row in kernels if row["violations"]]
    findings = expected.compare_kernels(kernels, f"triton {report['about']['triton']}", expected.read())
    assert not [f.line() for f in findings if f.verdict in (expected.LOSS, expected.NEW)]
    known = read_kernels(committed("gpu_static"))
    listed, found = (list(map(identity, given)) for given in (known, kernels))
    if option is None:
        assert found == listed
    else:
        assert set(found) < set(listed)
        assert {row[0] for row in found} == {row[0] for row in listed}
        assert {row[1:] for row in found} == {row[1:] for row in listed}, "a kernel lacks an architecture"


def test_a_text_that_no_case_contains_is_refused(tmp_path, capsys):
    for arguments, message in (
        (["--only", "adalm"], "--only adalm: no case matches; cases start with adaln"),
        (["--only", "adaln", "--json", str(tmp_path)], str(tmp_path)),
    ):
        assert gpu_static.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_reports_are_read_as_written(tmp_path):
    mix = {"matrix": 1, "other": 2}
    rows = [
        {"case": "a", "registers": 3, "instructions": mix},
        {"case": "b", "registers": 4, "instructions": None},
    ]
    write_compact(tmp_path / "static.json", to_report(rows, "3.8.0"))
    assert read_kernels(tmp_path / "static.json") == rows
    assert json.loads((tmp_path / "static.json").read_text())["about"]["triton"] == "3.8.0"


def identity(row):
    return row["case"], row["name"], row["architecture"]


@pytest.mark.parametrize(
    ("budget", "kernel", "message"),
    [
        ({}, {"spill_bytes": 8}, "spills 8 bytes"),
        ({"occupancy": 0.5}, {"occupancy": 0.4}, "occupancy 40% is under 50%"),
        ({"blocks": 2}, {"blocks": 1}, "1 blocks fit"),
        ({"wide_access": True}, {"wide_accesses": 0}, "no 128-bit access"),
        ({"matrix_instructions": True}, {"warpgroup_instructions": 1}, "no HMMA instructions"),
        ({"matrix_instructions": True}, {"architecture": 90, "matrix_instructions": 8}, "no HGMMA"),
    ],
    ids=str,
)
def test_a_kernel_over_budget_is_reported(budget, kernel, message):
    assert Budget(kind="test", **budget).violations(FRUGAL) == [] or "matrix_instructions" in budget
    (violation,) = Budget(kind="test", **budget).violations(Kernel(**{**vars(FRUGAL), **kernel}))
    assert message in violation


def test_triton_3_6_may_spill_a_little():
    """The GPU check's machine has that version."""
    spilling = Kernel(**{**vars(FRUGAL), "spill_bytes": 24})
    assert Budget(kind="test").violations(spilling, tolerated_spills("3.6.0")) == []
    assert Budget(kind="test").violations(spilling, tolerated_spills("3.8.0")) == ["spills 24 bytes"]
