"""For the tests of operators: forcing a backend, where this machine has it."""

import pytest

from cat_fast.kernels import backends


@pytest.fixture
def require(monkeypatch):
    """Skips, and says why, where an operator lacks a backend: no fallback is compared with itself."""

    def check(op, name):
        monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
        (status,) = (row.status for row in backends.report() if (row.op, row.backend) == (op, name))
        if status != "active":
            pytest.skip(f"{op} {name}: {status}")

    return check


@pytest.fixture
def force(require, monkeypatch):
    """The same, and the backend is forced for the rest of the test."""

    def check(op, name):
        require(op, name)
        monkeypatch.setenv("CAT_FAST_BACKEND", name)

    return check
