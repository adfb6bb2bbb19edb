"""The straggler benchmark at toy size: waiting agrees with probability, and `balanced` hardly waits."""

import json
from dataclasses import replace

import pytest

from benchmarks import straggler
from benchmarks.shared.committed import committed
from cat_fast.data.sampling.balanced_plan import BalancedPlan
from cat_fast.data.sampling.cost_table import Cost, CostTable, Measurement
from cat_fast.data.sampling.step_plan import PerRankPlan

PAPER = CostTable(costs={8: Cost(0, 1153), 16: Cost(0, 592), 32: Cost(0, 497)}, unit="flops")
"""Giga multiply-accumulates of a forward pass at the paper's size."""


@pytest.mark.parametrize("ranks", straggler.WORLD_SIZES)
def test_balanced_ranks_wait_less_than_three_percent(ranks):
    plan = BalancedPlan(straggler.MIX, straggler.BATCH_SIZE, ranks, 0, PAPER)
    row = straggler.simulate(plan, PAPER, 60)
    assert row["wait"] < straggler.TARGET
    for ratio, share in straggler.MIX.items():
        assert row[f"share_{ratio}x"] == pytest.approx(share, abs=0.01)
    assert row["mean_batch"] == pytest.approx(ranks * straggler.BATCH_SIZE, rel=0.1)


@pytest.mark.parametrize(
    ("ranks", "expected", "steps"), [(8, 0.33, 3000), (64, 0.472, 400), (1024, 0.473, 50)]
)
def test_independent_ranks_wait_as_long_as_probability_predicts(ranks, expected, steps):
    plan = PerRankPlan(straggler.MIX, 8, ranks, seed=1)
    row = straggler.simulate(plan, PAPER, steps)
    closed = straggler.expected_wait(PAPER, 8, ranks)
    assert closed == pytest.approx(expected, abs=0.005)
    assert row["wait"] == pytest.approx(closed, abs=0.01)


def test_a_step_takes_the_measured_time_not_the_fitted_cost():
    measured = [Measurement(8, n, seconds, seconds, seconds, 1) for n, seconds in ((4, 5.0), (8, 9.0))]
    table = CostTable(costs={8: Cost(0.0, 1.0), 16: Cost(0.0, 2.0)}, measured=measured)
    assert [straggler.step_cost(table, 8, n) for n in (3, 4, 6, 8, 10)] == [4.0, 5.0, 7.0, 9.0, 11.0]
    assert straggler.step_cost(table, 16, 4) == 8.0


def test_errors_of_the_fit_make_balanced_ranks_wait():
    off = {8: 1.2, 16: 1.0, 32: 1.0}
    measured = [
        Measurement(f, n, off[f] * cost(n), 0.0, 0.0, 1) for f, cost in PAPER.costs.items() for n in (1, 16)
    ]
    plan = BalancedPlan(straggler.MIX, straggler.BATCH_SIZE, 64, 0, PAPER)
    row = straggler.simulate(plan, replace(PAPER, measured=measured), 60)
    work = {f: straggler.MIX[f] * cost(1) for f, cost in PAPER.costs.items()}
    ranks_at_8x = work[8] / sum(work.values())  # they take 1.2 times as long, and all others wait for them
    assert row["wait"] == pytest.approx(1 - (1 + 0.2 * ranks_at_8x) / 1.2, abs=0.01)


def test_noise_makes_even_equal_ranks_wait():
    plan = PerRankPlan({16: 1.0}, 8, 64, seed=0)
    assert straggler.simulate(plan, PAPER, 100)["wait"] == pytest.approx(0, abs=1e-12)
    # The greatest of 64 normal variables is 2.4 standard deviations above their mean.
    noisy = straggler.simulate(plan, PAPER, 400, jitter=0.05)["wait"]
    assert noisy == pytest.approx(1 - 1 / (1 + 0.05 * 2.4), abs=0.005)


def test_the_program_writes_every_row_and_fails_where_balanced_waits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(straggler, "WORLD_SIZES", (8,))
    table, out = tmp_path / "table.json", tmp_path / "out.json"
    PAPER.write(table)
    assert straggler.main(["--table", str(table), "--json", str(out), "--quick"]) == 0
    report = json.loads(out.read_text())
    keys = {"per_rank.8", "balanced.8", "per_rank.8.jitter", "balanced.8.jitter", "equal.8.jitter"}
    assert set(report["cases"]) == keys
    assert report["balanced.8.wait"] < 0.03 < report["per_rank.8.wait"]
    assert report["cases"]["balanced.8.jitter"]["wait"] > report["cases"]["balanced.8"]["wait"]
    assert report["costs"]["by_ratio"]["8"]["per_image"] == 1153
    assert report["about"]["cpu"]["threads"] > 0
    assert report["about"]["quick"]
    assert "balanced.8 " in capsys.readouterr().out
    monkeypatch.setattr(straggler, "TARGET", 0.01)
    assert straggler.main(["--table", str(table), "--quick"]) == 1
    assert straggler.main(["--table", str(tmp_path / "none.json"), "--quick"]) == 2


def test_in_the_committed_results_balanced_ranks_hardly_wait():
    """Check measured steps of 8, 64 and 1024 ranks; `per_rank` as predicted from the same table."""
    report = json.loads(committed("straggler").read_text())
    assert report["costs"]["unit"] == "seconds"
    for ranks in straggler.WORLD_SIZES:
        assert report[f"balanced.{ranks}.wait"] < straggler.TARGET
        row = report["cases"][f"per_rank.{ranks}"]
        assert row["wait"] == pytest.approx(row["expected_wait"], rel=0.05)
        # plans consist of complete images, each 12 % of a batch, and 8x costs only 7 % more than 32x here
        assert row["wait"] > 2 * report[f"balanced.{ranks}.wait"]
