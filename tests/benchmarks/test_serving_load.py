"""The load test of the server, short, and the promises that its results may break."""

import asyncio
from types import SimpleNamespace
from typing import ClassVar

import pytest

from benchmarks import serving_load
from benchmarks.serving_load import BURST, Server, broken_promises, broken_soak_promises, load, soak
from tests.inference.engine.mixes import tiny_pipeline

TIMINGS = {"/healthz answers in 100 ms at p99", "ready in 20 s"}
"""Promises about an idle machine."""


@pytest.fixture
def server(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    started = Server(str(tmp_path / "pipeline"), tmp_path / "log")
    yield started
    started.process.kill()
    started.process.wait()


@pytest.mark.slow
def test_a_loaded_server_keeps_its_promises(server):
    found = asyncio.run(load(server, requests=40, seconds=4, long_steps=1000))
    assert set(broken_promises(found)) <= TIMINGS, found
    assert sum(found["outcomes"]["valid before SIGTERM"].values()) == 16 + BURST
    assert sum(found["outcomes"]["malformed before SIGTERM"].values()) == 2
    assert found["before_sigterm"]["refused"]["invalid_value"] > 0


@pytest.mark.slow
def test_a_soaked_server_keeps_its_promises(server):
    found = asyncio.run(soak(server, minutes=0.1))
    assert set(broken_soak_promises(found)) <= {"memory rises by less than 20 MB"}, found
    assert all(found["outcomes"].values()), "of each kind of request"


def test_a_reply_that_is_not_json_ends_a_soak(monkeypatch):
    class Broken:
        settings: ClassVar = {}

        def __init__(self, client, seed):
            self.sent = 0

        async def find_settings(self):
            pass

        async def send(self, kind):
            self.sent += 1
            if self.sent > serving_load.WARM_UP:
                raise ValueError("not JSON")

    async def ready(client):
        return 0.0

    async def counters(client):
        return {"unfinished": 0}

    async def exit_server():
        return 0, 0.0

    monkeypatch.setattr(serving_load, "Requests", Broken)
    monkeypatch.setattr(serving_load, "counters", counters)
    held = {"resident_bytes": 0}
    server = SimpleNamespace(address="http://test", ready=ready, held=lambda: held, exit=exit_server)
    with pytest.raises(ValueError, match="not JSON"):
        asyncio.run(asyncio.wait_for(soak(server, minutes=0.001), 30))


def changed(found, key, **changes):
    return found | {key: found[key] | changes}


GOOD_LOAD = {
    "outcomes": {
        "valid before SIGTERM": {"image": 3, "503 lost": 1},
        "valid after SIGTERM": {"503 draining": 2},
        "malformed before SIGTERM": {"400 invalid_value": 2},
    },
    "before_sigterm": {"sent": 7, "submitted": 5, "refused": {"invalid_value": 2}, "unfinished": 2},
    "totals": {"submitted": 5, "finished": 3, "cancelled": 1, "failed": 1, "lost": 1},
    "exit_code": 0,
    "drain_seconds": 61,
    "health_p99_seconds": 0.05,
    "ready_seconds": 10,
    "resident_bytes": 1 << 30,
}


@pytest.mark.parametrize(
    ("found", "broken"),
    [
        (GOOD_LOAD, []),
        (changed(GOOD_LOAD, "totals", finished=2), ["counters add up"]),
        (GOOD_LOAD | {"exit_code": 3}, ["a clean drain exits with 0"]),
        (GOOD_LOAD | {"drain_seconds": 2}, ["images are lost at the drain limit only"]),
        (changed(GOOD_LOAD, "before_sigterm", unfinished=0), ["requests are in flight at SIGTERM"]),
        (changed(GOOD_LOAD, "before_sigterm", refused={}), ["every request is submitted or refused"]),
        (
            changed(GOOD_LOAD, "outcomes", **{"valid before SIGTERM": {"503 draining": 1}}),
            ["every accepted request ends in its image, or is lost at the drain limit"],
        ),
        (
            changed(GOOD_LOAD, "outcomes", **{"malformed before SIGTERM": {"500 internal_error": 1}}),
            ["malformed requests get a 4xx with a reason"],
        ),
    ],
)
def test_broken_promises_of_a_load_test(found, broken):
    assert broken_promises(found) == broken


SAMPLE = {"minute": 2.0, "resident_bytes": 1 << 30, "threads": 23, "files": 14}
GOOD_SOAK = {
    "outcomes": {
        "valid": {"image": 5},
        "upload": {"reconstructions": 2},
        "cancelled": {"cancelled by the client": 2},
        "malformed": {"400 invalid_value": 1},
    },
    "samples": [SAMPLE, SAMPLE],
    "growth_bytes": 19_999_999,
    "totals": {
        "submitted": 7, "finished": 5, "cancelled": 2, "failed": 0, "lost": 0, "refused": {"invalid_value": 1}
    },
    "exit_code": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "broken"),
    [
        (GOOD_SOAK, []),
        (GOOD_SOAK | {"growth_bytes": 20_000_000}, ["memory rises by less than 20 MB"]),
        (GOOD_SOAK | {"samples": [SAMPLE, SAMPLE | {"threads": 24}]}, ["no thread is left"]),
        (GOOD_SOAK | {"samples": [SAMPLE, SAMPLE | {"files": 15}]}, ["no file is left open"]),
        (GOOD_SOAK | {"exit_code": 3}, ["a clean drain exits with 0"]),
        (changed(GOOD_SOAK, "totals", finished=4, failed=1), ["nothing fails"]),
        (changed(GOOD_SOAK, "totals", refused={}), ["every request is submitted or refused"]),
    ],
)
def test_broken_promises_of_a_soak(found, broken):
    assert broken_soak_promises(found) == broken
