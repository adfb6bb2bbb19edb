"""`cat-fast info` agrees with the installed packages and the kernels' own report."""

import platform
from dataclasses import asdict

import pytest
import torch

from cat_fast.kernels import backends, library
from cat_fast.kernels.linear.op import BACKENDS
from tests.cli.conftest import parse_json


def test_json_has_versions_devices_and_every_backend(cat_fast):
    report = parse_json(cat_fast("info", "--json"))
    assert report["python"] == platform.python_version()
    assert report["packages"]["torch"] == torch.__version__.split("+")[0]
    assert {"triton", "xformers", "deepspeed", "diffusers", "transformers"} <= report["packages"].keys()
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert report["cpu"]["instruction_set"] == library.instruction_set()
    assert report["kernels"] == [asdict(row) for row in backends.report()]
    assert report["linear_backend"] in BACKENDS
    assert set(report["row_invariant_blocks"]) == {"float32", "bfloat16"}
    assert report["row_invariant_blocks"]["float32"] in (1, 8, 16, 32, 64)


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("cuda", 1, "used: sampling replays a graph"),
        ("cpu", 1, "not used: DS_ACCELERATOR=cpu selects the CPU"),
        ("cpu", 0, "not used: there is no GPU"),
    ],
)
def test_the_use_of_cuda_graphs_is_stated(cat_fast, monkeypatch, device, gpus, expected):
    monkeypatch.setattr("cat_fast.hardware.run_device_type", lambda: device)
    monkeypatch.setattr("cat_fast.kernels.linear.op.calibrate", lambda: "mkl")  # time
    found = [{"name": "GPU", "memory_gib": 80.0, "compute_capability": "9.0"}] * gpus
    monkeypatch.setattr("cat_fast.cli.info._gpus", lambda: found)
    assert parse_json(cat_fast("info", "--json"))["cuda_graphs"].startswith(expected)
    assert expected in cat_fast("info").stdout


@pytest.mark.parametrize(
    ("block", "expected"), [(16, "independent in blocks of 16 rows"), (None, "dependent")]
)
def test_whether_bits_depend_on_neighbours_is_stated(cat_fast, monkeypatch, block, expected):
    blocks = {"float32": block, "bfloat16": 8}
    monkeypatch.setattr("cat_fast.cli.info._row_invariant_blocks", lambda: ("mkl", blocks))
    line = f"matrix products of a row and its neighbours, with mkl: float32 {expected}, bfloat16 independent"
    assert line in " ".join(cat_fast("info").stdout.split())


def test_table_has_the_reason_why_a_backend_is_inactive(cat_fast, monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "reference")
    output = cat_fast("info").stdout
    assert "reference is forced" in output
    for row in backends.report():
        assert row.op in output


def test_unknown_backend_is_reported_on_one_line(cat_fast, monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "abacus")
    result = cat_fast("info")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: CAT_FAST_BACKEND=abacus")
