"""The committed results of serving: every schedule was tuned and measured, and the goals are reached."""

import json

import pytest

from benchmarks.shared.committed import committed

MEASURED = json.loads(committed("serving").read_text(encoding="utf-8"))
LOADS = [(mix, load) for mix, loads in MEASURED["mixes"].items() for load in loads]
BUDGETS = {
    "dynamic_batching": 4,
    "fifo_step_batching": 4,
    "deficit_round_robin": 4,
    "engine_fifo_packed": 3,
    "engine": 3,
}
"""Number of row budgets tried; the engine's are at least the rows of the largest request."""
COLUMNS = {"images_per_second", "p50", "p95", "p99", "within_three_times_alone", "longest_wait", "fill"}
PATIENCE = 32


def test_every_load_is_measured_or_named_as_missing():
    measured = {f"{mix} {load}x" for mix, load in LOADS}
    missing = set(MEASURED["about"].get("missing", ()))
    assert measured | missing == {"cat 0.5x", "cat 0.8x", "cat 1x", "cat 2x", "dataset_c 0.8x"}
    assert {"cat 0.8x", "cat 2x"} <= measured
    assert MEASURED["kind"] == "measured"


@pytest.mark.parametrize(("mix", "load"), LOADS)
def test_schedules_are_tuned_and_measured_in_three_rounds_with_the_engine_twice(mix, load):
    found = MEASURED["mixes"][mix][load]
    assert found["requests"] == 100
    assert found["runs"].keys() == {*BUDGETS, "engine_again"}
    for name, runs in found["runs"].items():
        assert len(runs) == 3
        assert all(run.keys() >= COLUMNS for run in runs)
        assert found["median"][name].keys() >= COLUMNS
    for name, least in BUDGETS.items():
        assert len({setting.split(",")[0] for setting in found["sweep"][name]}) >= least
        assert found["settings"][name] in found["sweep"][name]
    assert len({setting.split("wait=")[1] for setting in found["sweep"]["dynamic_batching"]}) == 3


@pytest.mark.parametrize(("mix", "load"), LOADS)
def test_no_request_starves(mix, load):
    runs = MEASURED["mixes"][mix][load]["runs"]["engine"]
    assert all(run["longest_wait"] <= PATIENCE + 100 for run in runs)


def test_goals_are_reached():
    missed = {
        (mix, load, name)
        for mix, load in LOADS
        for name, goal in MEASURED["mixes"][mix][load]["goals"].items()
        if not goal["met"]
    }
    assert missed == set()
