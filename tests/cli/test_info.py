"""`cat-fast info` agrees with what the packages and the kernels say of themselves."""

import platform

import torch

from cat_fast.kernels import backends
from tests.cli.conftest import parse_json


def test_json_holds_versions_devices_and_every_backend(cat_fast):
    report = parse_json(cat_fast("info", "--json"))
    assert report["python"] == platform.python_version()
    assert report["packages"]["torch"] == torch.__version__.split("+")[0]
    assert {"triton", "xformers", "deepspeed", "diffusers", "transformers"} <= report["packages"].keys()
    assert len(report["gpus"]) == torch.cuda.device_count()
    rows = [(row["op"], row["backend"], row["status"]) for row in report["kernels"]]
    assert rows == backends.report()


def test_tables_say_why_a_backend_is_not_active(cat_fast, monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "reference")
    told = cat_fast("info").stdout
    assert "CAT_FAST_BACKEND=reference is set" in told
    for op, _, _ in backends.report():
        assert op in told


def test_an_unknown_backend_is_one_line(cat_fast, monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "abacus")
    result = cat_fast("info")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: CAT_FAST_BACKEND=abacus")
