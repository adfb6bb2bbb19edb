"""The model of training on many GPUs: traffic, links, simulation and the command's table."""

import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import scaling
from benchmarks.bounds.data_sheets import read_sheets
from benchmarks.cluster import links, simulation, work, zero
from benchmarks.cluster.model import (
    Failures,
    communicate,
    slowest_of,
    waiting_for_data,
)
from benchmarks.cluster.zero import Exchange, exchanges
from benchmarks.shared.committed import committed
from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.errors import UserError
from cat_fast.training.checkpoints.engine_state import parameter_count, saved_bytes
from tests.training.rank_processes import run_ranks

NODES, ASSUMED = links.read_links()
SHEETS, _ = read_sheets()
WORK = work.Work(
    engines=[
        work.Engine(name="autoencoder", tensors=[38_000_000] * 5),
        work.Engine(name="discriminator", tensors=[28_000_000]),
    ],
    seconds={8: Cost(0.01, 0.2), 16: Cost(0.01, 0.12), 32: Cost(0.01, 0.1)},
    launches={8: 100, 16: 100, 32: 100},
    optimizer_seconds=0.064,
    activations={ratio: Cost(1e9, slope) for ratio, slope in ((8, 4e9), (16, 3e9), (32, 2e9))},
)
RUNS = {run.name: run for run in simulation.RUNS}


def cluster(gpu: str = "A100") -> simulation.Cluster:
    return simulation.Cluster(node=NODES[gpu], sheet=SHEETS[gpu], assumed=ASSUMED, loader_rate=100.0)


def simulate(name, ranks, stage=2, gpu="A100", costs=WORK):
    return simulation.simulate_run(RUNS[name], costs, cluster(gpu), ranks, stage)


def sent(tensors, stage, accumulation=1):
    return sum(one.sent_bytes(2) for one in exchanges(tensors, stage, accumulation))


def test_stages_1_and_2_send_three_sizes_of_the_weights_and_stage_3_two():
    tensors, size, norm = [60_000_000, 30_000_000], 4 * 90_000_000, 4
    half = 1 / 2  # (ranks - 1) / ranks
    assert sent(tensors, 1) == sent(tensors, 2) == 3 * size * half + norm
    assert sent(tensors, 3) == 2 * size * half + norm
    assert sent(tensors, 1, accumulation=2) == 3 * size * half + norm
    assert sent(tensors, 2, accumulation=2) == (2 * 2 + 1) * size * half + norm
    assert sent(tensors, 3, accumulation=2) == 2 * 2 * size * half + norm


def test_stage_3_gathers_weights_twice_that_are_reused_late():
    assert sent([100_000_000] * 7, 3) == 4 * (700_000_000 + 900_000_000) / 2 + 4
    assert zero.resident_elements([100_000_000] * 7 + [50_000]) == 500_050_000


def test_all_buckets_but_the_last_overlap_with_the_backward_pass():
    first, second, *_ = exchanges([40_000_000, 30_000_000, 30_000_000], 1)
    assert (first.elements, first.calls, first.hidden_by) == (40_000_000, 1, None)
    assert (second.elements, second.calls, second.hidden_by) == (60_000_000, 2, "backward")


def test_stage_3_waits_for_the_first_bucket_of_weights_and_for_small_tensors():
    found = exchanges([100_000_000] * 6 + [50_000], 3, accumulation=2)
    gathers = {(one.elements, one.calls, one.hidden_by) for one in found if one.collective == "all_gather"}
    assert gathers == {
        (2 * 50_000_000, 2, None),
        (2 * 550_000_000, 2 * 11, "forward"),
        (2 * 100_000_000, 2 * 2, "backward"),
        (50_000, 1, None),
    }


def test_the_collectives_are_those_of_deepspeed(tmp_path):
    run_ranks("tests.benchmarks.test_scaling:count_on_rank", 2, tmp_path)
    for stage in (1, 2, 3):
        found = json.loads((tmp_path / f"{stage}.json").read_text())
        calls, elements = Counter(), Counter()
        for one in exchanges(found.pop("tensors"), stage, accumulation=2):
            calls[one.collective] += one.calls
            elements[one.collective] += one.elements
        assert found == {name: [calls[name], elements[name]] for name in calls}


def count_on_rank(folder: str) -> None:
    """Count the collectives of a step of two backward passes on one of two ranks, by stage."""
    warnings.simplefilter("ignore", FutureWarning)
    from cat_fast.training.config.settings import OptimizerConfig
    from cat_fast.training.runtime.engine import make_engine
    from cat_fast.training.runtime.ranks import start, stop

    counts: dict[str, list[int]] = {}
    for name, function in list(vars(torch.distributed).items()):
        if isinstance(function, FunctionType) and name.startswith(("all_", "reduce", "broadcast")):
            setattr(torch.distributed, name, counted(name, function, counts))
    ranks = start()
    for stage in (1, 2, 3):
        model = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(400, 400))
        tensors = [parameter.numel() for parameter in model.parameters()]
        optimizer = OptimizerConfig(lr=1e-3, max_grad_norm=1.0)
        engine = make_engine(model, optimizer, f"deepspeed/zero{stage}.json", accumulation_steps=2)
        for _ in range(3):  # the first ones set up
            counts.clear()
            for _ in range(2):
                engine.backward(engine(torch.ones(2, 400)).sum())
                engine.step()
        if ranks.is_main:
            (Path(folder) / f"{stage}.json").write_text(json.dumps({"tensors": tensors, **counts}))
    stop()


def counted(name, function, counts):
    """Return the function, which counts its calls and the elements of its largest tensors."""

    def run(*given, **named):
        sizes = [one.numel() for one in (*given, *named.values()) if isinstance(one, torch.Tensor)]
        kind = name.removesuffix("_into_tensor").removesuffix("_tensor")
        calls, elements = counts.get(kind, (0, 0))
        counts[kind] = [calls + 1, elements + max(sizes, default=0)]
        return function(*given, **named)

    return run


def test_communication_hides_behind_its_pass_up_to_the_time_of_computing():
    class Constant:
        def seconds(self, exchange):
            return 0.1 * exchange.calls

    found = [
        Exchange(collective="all_reduce", elements=1, calls=3, hidden_by="backward"),
        Exchange(collective="all_gather", elements=1, calls=2, hidden_by="forward"),
        Exchange(collective="all_gather", elements=1, calls=1),
    ]
    for forward, backward, exposed in ((0.0, 0.0, 0.6), (0.0, 0.2, 0.4), (0.1, 9.0, 0.2), (9.0, 9.0, 0.1)):
        part = communicate(found, Constant(), forward=forward, backward=backward)
        assert part.exposed == pytest.approx(exposed)
        assert part.exposed + part.hidden == pytest.approx(0.6)


def test_gathered_weights_hide_behind_the_forward_pass():
    """Under ZeRO 3 only the last reduced bucket, the first gathered one and single values are waited for."""
    costs = work.Work(
        engines=[work.Engine(name="transformer", tensors=[50_000_000] * 8)],
        seconds={16: Cost(0.0, 1.0)},
        launches={16: 1},
        optimizer_seconds=0.0,
        activations={16: Cost(0.0, 1e8)},
    )
    row = simulate("transformer", 8, 3, costs=costs)
    calls, link = row["accumulation"], links.NcclLink(NODES["A100"], 8, ASSUMED)
    waited_for = [
        Exchange(collective="reduce_scatter", elements=calls * 50_000_000, calls=calls),
        Exchange(collective="all_gather", elements=calls * 50_000_000, calls=calls),
        Exchange(collective="all_reduce", elements=1, calls=1),
        zero.CONTROL,
    ]
    assert row["communication_ms"] == pytest.approx(1e3 * sum(map(link.seconds, waited_for)))


def test_a_ring_over_nodes_is_as_fast_as_their_adapters():
    node = NODES["A100"]
    assert node.ring_bandwidth(8) == 300e9
    assert node.ring_bandwidth(16) == 200e9
    assert all("https://" in node.source for node in NODES.values())


def test_a_collective_takes_the_hops_of_the_fastest_algorithm_and_its_bytes():
    def microseconds(exchange, ranks):
        return 1e6 * links.NcclLink(NODES["A100"], ranks, ASSUMED).seconds(exchange)

    large = Exchange(collective="all_reduce", elements=50_000_000, calls=1)
    # A ring of 16: 28 hops over NVLink, 2 over the network, and 375 MB at 70 % of 200 GB/s.
    assert microseconds(large, 16) == pytest.approx(8.4 + 28 * 3.4 + 2 * 14 + 375e6 / 140e9 * 1e6)
    # A tree over 128 nodes: 14 hops within a node, 14 between nodes, at 92 % of the bandwidth.
    bytes_ = 2 * 4 * 50e6 * 1023 / 1024
    tree = 8.4 + 14 * 4 + 14 * 14 + bytes_ / (0.92 * 140e9) * 1e6
    assert microseconds(large, 1024) == pytest.approx(tree)
    # Only rings gather: 1023 hops, 127 of them between nodes.
    small = Exchange(collective="all_gather", elements=2, calls=2)
    assert microseconds(small, 1024) == pytest.approx(2 * (6.6 + 896 * 0.6 + 127 * 2.7), rel=1e-3)


def test_invalid_links_are_refused(tmp_path):
    content = json.loads(links.FILE.read_text())
    content["assumptions"]["link_share"]["value"] = 1.2
    (tmp_path / "links.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"link_share must be at most 1, got 1\.2"):
        links.read_links(tmp_path / "links.json")


def test_the_document_lists_every_parameter_without_a_source():
    named = {
        "prices": "Prices",
        "seconds_per_launch": "the time of a launch",
        "backward_share": "the share of the backward pass",
        "storage_bytes_per_second": "the speed of storage",
        "restart_seconds": "the time of a restart",
    }
    assumed = {name for name, source in ASSUMED.sources.items() if source.startswith("assumed")}
    assumed |= {"prices" for node in NODES.values() if node.price_source == "assumed"}
    assert assumed == set(named)
    text = " ".join((Path(__file__).parents[2] / "docs/efficiency.md").read_text(encoding="utf-8").split())
    *others, last = named.values()
    assert f"{', '.join(others)} and {last} have no source" in text


def test_the_slowest_of_many_ranks_is_at_the_most_expensive_ratio():
    costs, shares = {8: 2.0, 16: 1.0}, {8: 0.1, 16: 0.9}
    assert slowest_of(costs, shares, 1) == pytest.approx(1.1)
    assert slowest_of(costs, shares, 2) == pytest.approx(2 - 0.81)
    assert slowest_of(costs, shares, 1024) == pytest.approx(2)


def simulate_failures(failures: Failures, hours: float, seed: int = 0) -> float:
    """Return the hours that a run takes whose failures are drawn from an exponential distribution."""
    rng = np.random.default_rng(seed)
    cycle = failures.interval_seconds + failures.checkpoint_seconds
    needed, elapsed = hours * 3600, 0.0
    while needed > 0:
        time = rng.exponential(3600 * failures.hours_between)
        whole = needed / failures.interval_seconds * cycle
        if time >= whole:
            return (elapsed + whole) / 3600
        needed -= int(time // cycle) * failures.interval_seconds
        elapsed += time + failures.restart_seconds
    return elapsed / 3600


def test_failures_cost_half_an_interval_and_a_restart():
    failures = Failures(
        hours_between=10.0, checkpoint_seconds=20.0, interval_seconds=1800.0, restart_seconds=300.0
    )
    found = failures.hours(500.0)
    assert found["checkpoint_hours"] == pytest.approx(500 / 90)
    assert found["failures"] == pytest.approx(50 + 50 / 90)
    assert found["lost_hours"] == pytest.approx(found["failures"] / 4)
    assert found["restart_hours"] == pytest.approx(found["failures"] / 12)
    hours = np.mean([simulate_failures(failures, 500.0, seed) for seed in range(20)])
    assert found["hours"] == pytest.approx(hours, rel=0.01)
    never = Failures(
        hours_between=1e12, checkpoint_seconds=0.0, interval_seconds=1800.0, restart_seconds=300.0
    )
    assert simulate_failures(never, 500.0) == pytest.approx(500)


def test_data_delays_a_step_only_where_loading_is_slower():
    assert waiting_for_data(100, 1.0, 200) == 0
    assert waiting_for_data(100, 1.0, 50) == 1.0


def test_a_balanced_sampler_waits_less_and_parts_of_a_step_add_up():
    alone, balanced = simulate("tokenizer", 64), simulate("tokenizer, balanced", 64)
    assert balanced["ranks_wait_ms"] < 0.03 * balanced["step_ms"] < alone["ranks_wait_ms"]
    assert balanced["gpu_hours"] < alone["gpu_hours"]
    parts = ("computing_ms", "ranks_wait_ms", "communication_ms", "data_wait_ms")
    assert sum(alone[part] for part in parts) == pytest.approx(alone["step_ms"])
    # 0.01 s and 8 images at 0.1196 s each, and a 64th of the optimizer
    assert alone["computing_ms"] == pytest.approx(10 + 8 * (20 + 57.6 + 42) + 1)
    assert alone["steps"] == 1_000_000
    assert alone["cost"] == pytest.approx(1.5 * alone["gpu_hours"])
    assert alone["nvlink_gb"] == pytest.approx(3 * 4 * 0.218 * 63 / 64, rel=1e-6)
    assert alone["second_engine_gb"] == pytest.approx(3 * 4 * 0.028 * 63 / 64, rel=1e-6)
    assert 0 < alone["second_engine_ms"] < alone["communication_ms"]


def test_more_gpus_than_images_enlarge_the_global_batch():
    row = simulate("tokenizer", 1024)
    assert (row["batch"], row["steps"]) == (1, 500_000)
    assert not row["global_batch_of_the_paper"]
    assert simulate("tokenizer", 512)["global_batch_of_the_paper"]


def test_batches_that_do_not_fit_are_accumulated():
    one, two = simulate("tokenizer", 8, stage=1), simulate("tokenizer", 8, stage=2)
    # 64 images per rank; 16 take 65 GB of 72, 32 take 129.
    assert (one["batch"], one["accumulation"], one["fits"]) == (16, 4, True)
    assert one["network_gb"] == 0
    assert two["nvlink_gb"] == pytest.approx(3 * one["nvlink_gb"], rel=1e-3)  # 4 reductions: 4 * 2 + 1
    # Under stage 1 ranks wait for each other once per step, under stage 2 after each batch.
    assert 0 < one["ranks_wait_ms"] < two["ranks_wait_ms"]


def test_the_transformer_takes_the_batches_of_its_configuration():
    costs = work.Work(
        engines=[work.Engine(name="transformer", tensors=[10_000_000])],
        seconds={16: Cost(0.0, 0.01)},
        launches={16: 10_000},
        optimizer_seconds=0.0,
        activations={16: Cost(0.0, 1e8)},
    )
    row = simulate("transformer", 8, 1, costs=costs)
    assert (row["batch"], row["accumulation"]) == (64, 2)
    assert (row["computing_ms"], row["host_bound"]) == (pytest.approx(1280), False)
    row = simulate("transformer", 64, 1, costs=costs)
    assert (row["batch"], row["accumulation"]) == (16, 1)
    assert simulate("transformer", 128, 1, costs=costs)["batch"] == 16


def test_a_batch_takes_at_least_the_time_to_launch_its_operators():
    assert WORK.batch_seconds(8, 2, 1e-6) == pytest.approx(0.41)
    assert WORK.batch_seconds(8, 2, 1e-2) == pytest.approx(1.0)


def test_memory_adds_weights_optimizer_gradients_buckets_and_activations():
    costs = work.Work(
        engines=[work.Engine(name="model", tensors=[100_000_000])],
        seconds={16: Cost(0.0, 1.0)},
        launches={16: 1},
        optimizer_seconds=0.0,
        activations={16: Cost(1e9, 2e9)},
        frozen_bytes=5e8,
    )
    counts, activations = {16: 2}, 5e9
    ema, buckets, frozen = 0.4e9, 2 * 0.2e9, 0.5e9
    at_rest = 0.4e9 + 0.1e9 + 0.2e9  # weights, a fourth of the master weights, and of two moments
    common = at_rest + ema + buckets + frozen + activations
    assert work.memory_bytes(costs, counts, 4, 1) == common + 0.4e9
    assert work.memory_bytes(costs, counts, 4, 2) == common + 0.1e9
    partitioned = 4 * 0.1e9 + 0.1e9 + 0.1e9  # weights, master weights, two moments; average; gradients
    assert work.memory_bytes(costs, counts, 4, 3) == partitioned + 0.4e9 + 0.2e9 + frozen + activations


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_has_the_states_of_all_engines_and_the_average_of_the_first(stage):
    modules = [torch.nn.Linear(30, 10), torch.nn.Linear(4, 1)]
    saved = [SimpleNamespace(module=one, zero_optimization_stage=lambda: stage) for one in modules]
    engines = [
        work.Engine(name="", tensors=[parameter.numel() for parameter in one.parameters()]) for one in modules
    ]
    expected = sum(map(saved_bytes, saved)) + 4 * parameter_count(modules[0])
    assert work.checkpoint_bytes(replace(WORK, engines=engines), stage) == expected


def test_a_checkpoint_stops_the_run_while_it_is_written():
    seconds = work.checkpoint_bytes(WORK, 2) / ASSUMED.storage_bytes_per_second
    assert simulate("tokenizer", 64)["checkpoint_hours"] == pytest.approx(1_000_000 / 5000 * seconds / 3600)


def test_the_best_stage_is_the_fastest_that_fits_and_ties_are_marked():
    large = work.Work(
        engines=[work.Engine(name="transformer", tensors=[100_000_000] * 120)],
        seconds={16: Cost(0.0, 0.01)},
        launches={16: 1},
        optimizer_seconds=0.0,
        activations={16: Cost(0.0, 1e8)},
    )
    rows = [simulate("transformer", 64, stage, "H100", large) for stage in (1, 2, 3)]
    assert [row["fits"] for row in rows] == [False, False, True]
    assert [row["stage"] for row in simulation.best(rows)] == [3]
    assert simulation.best(rows[:2]) == []
    small = [simulate("tokenizer", 64, stage) for stage in (1, 2)]
    assert [row["stage"] for row in simulation.best(small)] == [1, 2]
    report = {
        "columns": list(small[0]),
        "runs": {
            "tokenizer": {
                "best_stages": {"64": [1, 2], "8": []},
                "rows": [list(row.values()) for row in small],
            }
        },
    }
    text = list(scaling.lines(report))
    assert text[2].startswith("| tokenizer | 64 | 1 = 2 | 8 |")
    assert "does not fit" in text[3]
    assert {line.count("|") for line in text} == {text[0].count("|")}


@pytest.mark.parametrize(
    ("rates", "details"), [({"images": 300.0}, {}), ({}, {"images_per_second": 300.0})], ids=["new", "old"]
)
def test_the_loaders_rate_is_that_of_most_workers(tmp_path, monkeypatch, rates, details):
    cases = {
        "workers_1": {"rates": {"images": 127.0}, "details": {"workers": 1}},
        "workers_2": {"rates": rates, "details": {"workers": 2, **details}},
    }
    path = tmp_path / "loader_amd-epyc-2t_2026-12-01.json"
    path.write_text(json.dumps({"cases": cases}))
    monkeypatch.setattr(scaling, "committed", lambda model: path)
    assert scaling.loader_rate() == (150.0, f"benchmarks/results/{path.name}")


def table(**changes):
    about = {
        "device": "cuda",
        "side": 512,
        "precision": "bf16",
        "machine": {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]},
        **changes,
    }
    return CostTable(costs=WORK.seconds, about=about)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu"}, "expected device cuda, got cpu"),
        ({"side": 256}, "expected side 512, got 256"),
        ({"precision": "fp32"}, "expected precision bf16, got fp32"),
        ({"machine": {"gpus": ["Tesla T4"]}}, "expected costs measured on one of A100, .*, got Tesla T4"),
        ({"machine": {"gpus": ["NVIDIA GH200 480GB"]}}, "expected costs measured on .*, got NVIDIA GH200"),
    ],
)
def test_a_table_of_another_machine_or_size_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        work.measured_on(table(**changes), list(NODES), "--table t.json")


def test_a_measured_table_applies_to_its_gpu_only():
    assert work.measured_on(table(), list(NODES), "t.json") == "H100"
    found = work.measured_work(WORK, table(), "measured: t.json")
    assert found.source == "measured: t.json"
    assert found.batch_seconds(16, 1, 1.0) == pytest.approx(0.13)  # launches are in the measured time


def test_the_committed_results_are_small_and_name_every_source():
    path = committed("scaling")
    assert path.stat().st_size < 100_000
    report = json.loads(path.read_text())
    assert all(one["source"] for one in report["about"]["assumptions"].values())
    assert all(node["price_source"] == "assumed" for node in report["nodes"].values())
    assert all(len(row) == len(report["columns"]) for run in report["runs"].values() for row in run["rows"])
    assert all(all(run["best_stages"].values()) for run in report["runs"].values())
