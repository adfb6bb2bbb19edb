"""The backend table: selection, forced backends, and error messages."""

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.kernels import backends
from cat_fast.kernels.backends import Backend
from cat_fast.kernels.varlen_attention import external

TABLE = (
    Backend(op="twist", name="triton", device="cuda", dtypes=backends.FLOATS),
    Backend(op="twist", name="cpp", device="cpu", dtypes=(torch.float32,), limits={"width": range(8, 65, 8)}),
    Backend(op="twist", name="reference"),
    Backend(op="turn", name="reference"),
)
FP32 = torch.zeros(1)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(backends, "TABLE", TABLE)
    monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
    return monkeypatch.setenv


@pytest.mark.parametrize(
    ("x", "width", "chosen"),
    [(FP32, 8, "cpp"), (FP32, 12, "reference"), (FP32, 72, "reference"), (FP32.double(), 8, "reference")],
    ids=str,
)
def test_the_first_row_that_accepts_the_tensor_runs(x, width, chosen):
    assert backends.choose("twist", x, width=width) == chosen


def test_triton_is_interpreted_only_if_forced(monkeypatch, table):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends.triton_unavailable_reason.cache_clear()
    assert backends.choose("twist", FP32, width=4) == "reference"
    table("CAT_FAST_BACKEND", "triton")
    assert backends.choose("twist", FP32, width=4) == "triton"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cpp", "twist cannot run on this backend: expected width 8 to 64 in steps of 8, got 4"),
        ("cuda", "twist has no such backend: use one of triton, cpp, reference"),
        ("abacus", "backend 'abacus' is unknown"),
        ("twist=", "backend '' is unknown"),
        ("shout=cpp", "unknown operator shout"),
    ],
)
def test_an_impossible_forced_backend_is_refused(table, setting, message):
    table("CAT_FAST_BACKEND", setting)
    with pytest.raises(UserError, match=message):
        backends.choose("twist", FP32, width=4)


def test_operators_are_forced_one_by_one(table):
    table("CAT_FAST_BACKEND", "twist=reference")
    assert backends.choose("twist", FP32, width=8) == "reference"
    assert backends.forced_backend("turn") is None


def test_the_report_lists_constraints_and_status(table):
    table("CAT_FAST_BACKEND", "twist=cpp")
    assert [(row.op, row.backend, row.takes, row.status) for row in backends.report()][1:] == [
        ("twist", "cpp", "cpu; float32; width 8 to 64 in steps of 8", "active"),
        ("twist", "reference", "any tensor", "cpp is forced"),
        ("turn", "reference", "any tensor", "active"),
    ]


def test_the_table_is_searched_once_until_something_changes(monkeypatch):
    searched = []
    reason = Backend.rejection_reason

    def rejection_reason(self, *arguments):
        searched.append(self.name)
        return reason(self, *arguments)

    monkeypatch.setattr(Backend, "rejection_reason", rejection_reason)
    for _ in range(3):
        assert backends.choose("twist", FP32, width=8) == "cpp"
    assert searched == ["triton", "cpp"]
    monkeypatch.setenv("CAT_FAST_BACKEND", "reference")
    assert backends.choose("twist", FP32, width=8) == "reference"
    monkeypatch.delenv("CAT_FAST_BACKEND")
    monkeypatch.setattr(external, "_failed", {"one": "no kernel"})
    assert backends.choose("twist", FP32, width=8) == "cpp"
    assert searched == ["triton", "cpp", "reference", "triton", "cpp"]
    torch.use_deterministic_algorithms(True)
    try:
        assert backends.choose("twist", FP32, training=True, width=8) == "cpp"
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(searched) == 7
