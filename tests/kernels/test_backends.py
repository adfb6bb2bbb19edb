"""The table of backends: what is chosen, what can be forced, and what is said where that cannot be."""

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.kernels import backends
from cat_fast.kernels.backends import Backend

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
def test_the_first_row_that_takes_the_tensor_runs(x, width, chosen):
    assert backends.choose("twist", x, width=width) == chosen


def test_triton_is_never_interpreted_unasked(monkeypatch, table):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends.triton_obstacle.cache_clear()
    assert backends.choose("twist", FP32, width=4) == "reference"
    table("CAT_FAST_BACKEND", "triton")
    assert backends.choose("twist", FP32, width=4) == "triton"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("cpp", "twist cannot run there: it takes width 8 to 64 in steps of 8, not 4"),
        ("cuda", "twist has no such backend: it has triton, cpp, reference"),
        ("abacus", "backend 'abacus' is unknown"),
        ("twist=", "backend '' is unknown"),
        ("shout=cpp", "there is no operator shout"),
    ],
)
def test_what_cannot_be_forced_is_named(table, setting, said):
    table("CAT_FAST_BACKEND", setting)
    with pytest.raises(UserError, match=said):
        backends.choose("twist", FP32, width=4)


def test_operators_are_forced_one_by_one(table):
    table("CAT_FAST_BACKEND", "twist=reference")
    assert backends.choose("twist", FP32, width=8) == "reference"
    assert backends.forced_backend("turn") is None


def test_the_report_says_what_a_backend_takes(table):
    table("CAT_FAST_BACKEND", "twist=cpp")
    assert [(row.op, row.backend, row.takes, row.status) for row in backends.report()][1:] == [
        ("twist", "cpp", "cpu; float32; width 8 to 64 in steps of 8", "active"),
        ("twist", "reference", "any tensor", "cpp is forced"),
        ("turn", "reference", "any tensor", "active"),
    ]
