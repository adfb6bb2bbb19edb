"""The load test of the server, short: outcomes and counters of a process that is terminated in the middle."""

import asyncio

import pytest

from benchmarks.serving_load import Server, broken_promises, load
from tests.inference.engine.mixes import tiny_pipeline

TIMINGS = {"/healthz answers in 100 ms at p99", "ready in 20 s"}
"""Promises about an idle machine."""


@pytest.mark.slow
def test_a_loaded_server_keeps_its_promises(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    server = Server(str(tmp_path / "pipeline"), tmp_path / "log")
    found = asyncio.run(load(server, requests=40, seconds=4))
    assert set(broken_promises(found)) <= TIMINGS, found
    assert sum(found["outcomes"]["valid before SIGTERM"].values()) == 16
    assert sum(found["outcomes"]["malformed before SIGTERM"].values()) == 2
    assert found["totals"]["submitted"] > 0


def test_broken_promises_are_named():
    good = {
        "outcomes": {
            "valid before SIGTERM": {"image": 3, "503 draining": 1},
            "valid after SIGTERM": {"503 draining": 2},
            "malformed before SIGTERM": {"400 invalid_value": 2},
        },
        "totals": {"submitted": 5, "finished": 3, "cancelled": 1, "failed": 1, "lost": 1},
        "exit_code": 0,
        "drain_seconds": 61,
        "health_p99_seconds": 0.05,
        "ready_seconds": 10,
        "resident_bytes": 1 << 30,
    }
    assert broken_promises(good) == []
    lost = good | {"totals": good["totals"] | {"finished": 2}, "exit_code": 3}
    assert broken_promises(lost) == ["counters add up", "a clean drain exits with 0"]
    hung = good | {"outcomes": good["outcomes"] | {"malformed before SIGTERM": {"500 internal_error": 1}}}
    assert broken_promises(hung) == ["malformed requests get a 4xx with a reason"]
