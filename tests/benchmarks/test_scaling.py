"""The model of training on many GPUs: formulas, simulation, and validation on a made-up machine."""

import json

import numpy as np
import pytest

from benchmarks import scaling, scaling_validation
from benchmarks.bounds.data_sheets import read_sheets
from benchmarks.cluster import links, processes
from benchmarks.cluster.model import (
    Failures,
    Link,
    collectives,
    communication,
    simulate_failures,
    slowest_of,
    traffic_bytes,
    waiting_for_data,
)
from benchmarks.scaling_validation import Size, StepCost
from cat_fast.data.sampling.cost_table import Cost

NODES, ASSUMED = links.read_links()
SHEETS, _ = read_sheets()
COSTS = {8: Cost(0.01, 0.2), 16: Cost(0.01, 0.12), 32: Cost(0.01, 0.1)}
WORK = scaling.Work(
    seconds=COSTS,
    parameters=[190_000_000, 28_000_000],
    activation_bytes={8: 5e9, 16: 4e9, 32: 3.5e9},
    layers=200,
)
RUNS = {run.name: run for run in scaling.RUNS}


def simulate(name, ranks, stage=2, gpu="A100", work=WORK):
    return scaling.simulate_run(RUNS[name], work, NODES[gpu], SHEETS[gpu], ranks, stage, ASSUMED, 20)


def test_zero_3_sends_half_as_much_again_and_one_rank_sends_nothing():
    assert traffic_bytes(100, 2, 1) == traffic_bytes(100, 2, 2) == 2 * 4 * 100 / 2
    assert traffic_bytes(100, 4, 3) == 3 * 4 * 100 * 3 / 4
    link = Link(bytes_per_second=1e9, seconds_per_collective=1e-3)
    assert communication([10**6], 1, 3, link, 10**6, 5) == 0
    assert communication([10**6], 2, 2, link, 10**6, 5) == pytest.approx(4e6 / 1e9 + 2e-3)
    assert collectives(120, 2, 50, 9) == 3 + 1
    assert collectives(120, 3, 50, 9) == 3 + 18


def test_a_ring_over_nodes_is_as_fast_as_their_adapters():
    node = NODES["A100"]
    assert node.ring_bandwidth(8) == 300e9
    assert node.ring_bandwidth(16) == 200e9
    assert all("https://" in node.source for node in NODES.values())


def test_invalid_links_are_refused(tmp_path):
    content = json.loads(links.FILE.read_text())
    content["assumptions"]["link_share"] = 1.2
    (tmp_path / "links.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"link_share must be at most 1, got 1\.2"):
        links.read_links(tmp_path / "links.json")


def test_the_slowest_of_many_ranks_is_at_the_most_expensive_ratio():
    costs, shares = {8: 2.0, 16: 1.0}, {8: 0.1, 16: 0.9}
    assert slowest_of(costs, shares, 1) == pytest.approx(1.1)
    assert slowest_of(costs, shares, 2) == pytest.approx(2 - 0.81)
    assert slowest_of(costs, shares, 1024) == pytest.approx(2)


def test_failures_cost_half_an_interval_and_a_restart():
    failures = Failures(
        hours_between=10.0, checkpoint_seconds=20.0, interval_seconds=1800.0, restart_seconds=300.0
    )
    hours = np.mean([simulate_failures(failures, 500.0, seed) for seed in range(20)])
    assert 500 / failures.useful == pytest.approx(hours, rel=0.01)
    never = Failures(
        hours_between=1e12, checkpoint_seconds=0.0, interval_seconds=1800.0, restart_seconds=300.0
    )
    assert simulate_failures(never, 500.0) == pytest.approx(500)


def test_data_delays_a_step_only_where_loading_is_slower():
    assert waiting_for_data(100, 1.0, 200) == 0
    assert waiting_for_data(100, 1.0, 50) == 1.0


def test_a_balanced_sampler_waits_less_and_parts_of_a_step_add_up():
    alone, balanced = simulate("tokenizer", 64), simulate("tokenizer, balanced", 64)
    assert balanced["waiting_for_ranks"] < 0.03 < alone["waiting_for_ranks"]
    assert balanced["gpu_hours"] < alone["gpu_hours"]
    parts = ("computing", "waiting_for_ranks", "communicating", "waiting_for_data")
    assert sum(alone[part] for part in parts) == pytest.approx(1)
    assert alone["steps"] == 1_000_000
    assert alone["cost"] == pytest.approx(1.5 * alone["gpu_hours"])


def test_more_gpus_than_images_enlarge_the_global_batch():
    row = simulate("tokenizer", 1024)
    assert (row["batch_per_rank"], row["steps"]) == (1, 500_000)
    assert not row["global_batch_of_the_paper"]
    assert simulate("tokenizer", 512)["global_batch_of_the_paper"]


def test_the_best_stage_is_the_fastest_that_fits():
    large = scaling.Work(
        seconds={16: Cost(0.0, 0.01)}, parameters=[12 * 10**9], activation_bytes={16: 1e8}, layers=30
    )
    rows = [simulate("transformer", 64, stage, "H100", large) for stage in (1, 2, 3)]
    assert [row["fits"] for row in rows] == [False, False, True]
    assert scaling.best(rows)["stage"] == 3
    assert scaling.best(rows[:2]) is None
    small = [simulate("tokenizer", 64, stage) for stage in (1, 2)]
    assert scaling.best(small)["stage"] in (1, 2)
    report = {"runs": {"transformer": {"best": {"64": scaling.best(rows), "8": None}}}}
    text = list(scaling.lines(report))
    assert text[2].startswith("| transformer | 64 | 3 |")
    assert "does not fit" in text[3]


def toy_size(setting):
    work = setting.width**2 * 1e9
    return Size(flops={8: 2 * work, 16: 1.2 * work, 32: work}, parameters=setting.width**2 * 10**6, layers=50)


@pytest.mark.slow
def test_steps_and_the_link_are_measured_on_two_processes(tmp_path):
    setting = processes.Setting(name="small", batch=1, shares={16: 1.0}, steps=6)
    assert 0 < processes.step_seconds(setting, tmp_path / "run", 2, 2) < 60
    link = scaling_validation.fit_link(processes.measure_link())
    assert link.bytes_per_second > 1e7
    with pytest.raises(RuntimeError, match="failed on rank"):
        processes.step_seconds(setting, tmp_path / "other", 2, 9)  # no such stage


def test_the_validation_recovers_a_machine_that_follows_the_model():
    truth = StepCost(fixed=0.02, per_flop=2e-11, per_parameter=5e-9)
    link = Link(bytes_per_second=2e9, seconds_per_collective=1e-4)
    runs = []

    def run(setting, ranks, stage):
        runs.append((setting.name, ranks, stage))
        if ranks == 1:
            (ratio,) = setting.shares
            return truth.seconds(toy_size(setting), ratio, setting.batch)
        slower = 1.5 if setting.name == "another width" and stage == 3 else 1.0
        return slower * scaling_validation.predict(setting, toy_size(setting), stage, truth, link)

    measured = {size: 1e-4 + 4 * size / 2e9 for size in (1 << 12, 1 << 20, 1 << 24)}
    found = scaling_validation.validate(run, measured, toy_size)
    assert found["step"]["per_flop"] == pytest.approx(2e-11, rel=1e-3)
    assert found["link"]["bytes_per_second"] == pytest.approx(2e9, rel=1e-3)
    missed = [(row["configuration"], row["stage"]) for row in found["rows"] if not row["within"]]
    assert missed == [("another width", 3)]
    assert len(found["rows"]) == 9
    assert all(len(row["rounds"]) == 3 for row in found["rows"])
    unseen = {setting.name for setting in scaling_validation.UNSEEN}
    assert not {name for name, ranks, _ in runs if ranks == 1} & unseen
    two = [entry for entry in runs if entry[1] == 2]
    assert two[:9] == two[9:18][::-1] == two[18:]
