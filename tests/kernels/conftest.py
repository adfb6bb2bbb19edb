"""Tests of operators: Triton cases are gpu tests where its compiler runs; require or force a backend."""

import pytest

from cat_fast.kernels import backends
from tests.session import mark_compiled_triton


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    mark_compiled_triton(items)


@pytest.fixture
def require(monkeypatch):
    """Return a function that skips if an operator lacks a backend, so no fallback is compared with itself."""

    def check(op, name):
        monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
        (status,) = (row.status for row in backends.report() if (row.op, row.backend) == (op, name))
        if status != "active":
            pytest.skip(f"{op} {name}: {status}")

    return check


@pytest.fixture
def force(require, monkeypatch):
    """Return a function that does the same and forces the backend for the rest of the test."""

    def check(op, name):
        require(op, name)
        monkeypatch.setenv("CAT_FAST_BACKEND", name)

    return check
