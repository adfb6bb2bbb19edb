"""Encoding processes: errors at start-up, and threads per process."""

import os

import pytest

from cat_fast.errors import UserError
from cat_fast.inference.encoding import shard_processes
from cat_fast.inference.encoding.shard_plan import EncodeShardsSettings, work_units
from cat_fast.inference.encoding.shard_processes import encode_in_processes


def test_error_has_the_reason_why_a_process_could_not_start(tmp_path):
    settings = EncodeShardsSettings(source="photographs", out=tmp_path / "out", size=64)
    units, missing = work_units(0, 1, 2, 1), tmp_path / "missing"
    with pytest.raises(UserError, match=r"could not start: \S*missing: no such folder"):
        encode_in_processes(settings, missing, "cpu", ["sky"], units, 2, lambda kind, images: None)


def test_device_error_is_formatted_on_one_line():
    error = RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB. " + 9999 * "x")
    message = shard_processes._format_error(error)
    assert message.startswith("RuntimeError: CUDA out of memory. Tried to allocate 2 GiB. xxx")
    assert message.endswith("use fewer --workers")
    assert len(message) < 500


def test_processes_share_the_available_cpus(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 5, 6})
    assert [shard_processes._num_threads(workers) for workers in (1, 2, 3, 8)] == [4, 2, 1, 1]
