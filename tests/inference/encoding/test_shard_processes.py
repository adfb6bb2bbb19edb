"""Processes that make the latent cache: their share of the machine, and what is told of a failed start."""

import os

import pytest

from cat_fast.errors import UserError
from cat_fast.inference.encoding import shard_processes
from cat_fast.inference.encoding.shard_plan import CacheSettings, units_of
from cat_fast.inference.encoding.shard_processes import run_units


def test_a_process_that_cannot_start_says_why(tmp_path):
    settings = CacheSettings(source="photographs", out=tmp_path / "out", size=64)
    units, gone = units_of(0, 1, 2, 1), tmp_path / "gone"
    with pytest.raises(UserError, match=r"could not start: \S*gone: no such folder; expected the folder"):
        run_units(settings, gone, "cpu", ["sky"], units, 2, lambda kind, images: None)


def test_an_error_of_a_device_is_told_in_one_line():
    told = shard_processes._told(RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB. " + 9999 * "x"))
    assert told.startswith("RuntimeError: CUDA out of memory. Tried to allocate 2 GiB. xxx")
    assert told.endswith("try fewer --workers")
    assert len(told) < 500


def test_processes_share_the_cpus_that_this_one_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 5, 6})
    assert [shard_processes._threads(workers) for workers in (1, 2, 3, 8)] == [4, 2, 1, 1]
