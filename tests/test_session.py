"""The distribution of tests over workers, and the warning of a slow session."""

import pytest

from tests.session import LIMIT_SECONDS, ByFile, slow_session_warning, worker_threads


def test_files_that_start_ranks_are_one_unit_and_every_other_file_is_its_own():
    scheduler = ByFile.__new__(ByFile)
    nodes = ["tests/demo/test_story.py::test_x[a::b]", "tests/test_launch_scripts.py::test_y"]
    assert {scheduler._split_scope(node) for node in nodes} == {"ranks"}
    assert scheduler._split_scope("tests/data/test_files.py::test_z[1]") == "tests/data/test_files.py"


def test_only_a_session_over_the_limit_is_warned_of_and_by_the_features_of_the_machine():
    assert slow_session_warning(LIMIT_SECONDS) is None
    warning = slow_session_warning(LIMIT_SECONDS * 1.5)
    assert warning.startswith("warning: the tests took 30.0 minutes, more than 20, on ")
    assert "the processor has " in warning
    assert "\n" not in warning


@pytest.mark.parametrize(("workers", "threads"), [(None, None), ("1", None), ("2", 2), ("3", 1), ("9", 1)])
def test_workers_share_the_cores(monkeypatch, workers, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(5))
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    if workers is not None:
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", workers)
    assert worker_threads() == threads


def test_a_test_that_is_parametrized_with_nothing_is_an_error(pytestconfig):
    """By default it would be skipped, whatever it was to check."""
    assert pytestconfig.getini("empty_parameter_set_mark") == "fail_at_collect"
