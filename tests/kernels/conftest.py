"""Fixtures for the tests of operators: require or force a backend, or skip if this machine lacks it."""

import pytest

from cat_fast.kernels import backends


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
