"""Validation of the scaling model, on a made-up machine whose times are worked out by hand."""

import json

import pytest

from benchmarks import scaling_validation
from benchmarks.cluster import processes
from benchmarks.cluster.processes import typical_seconds
from benchmarks.cluster.settings import SKIPPED_STEPS, Size, TokenizerSetting, TransformerSetting
from benchmarks.cluster.zero import exchanges
from benchmarks.scaling_validation import (
    KNOWN,
    UNSEEN,
    Cell,
    fit_link,
    fit_step,
    line,
    measure,
    plan,
    read_runs,
    report,
)
from benchmarks.shared import machine
from cat_fast.errors import UserError

COLLECTIVES = {
    # 0.1 ms and 1 ns per byte; reduce-scatter 1.5 ns, all-gather 0.5 ns
    name: [(1, size, 1e-4 + 4 * size * per_byte) for size in (1 << 12, 1 << 20, 1 << 24)]
    for name, per_byte in (("all_reduce", 1e-9), ("reduce_scatter", 1.5e-9), ("all_gather", 0.5e-9))
} | {
    # launched together, a call takes 1 ms, whatever it sends
    processes.TOGETHER: [(16, 1 << 12, 0.016), (16, 1 << 19, 0.016), (64, 1 << 14, 0.064)],
}
OPTIMIZER = {size: size * 2e-9 for size in (1 << 18, 1 << 22)}
ONE_PROCESS = {  # ms: 20 + 20 per GFLOP, or 40 of attention, + 5 per million parameters
    "8x, 2 images": 20 + 80 + 5,
    "16x, 2 images": 20 + 48 + 5,
    "32x, 2 images": 20 + 40 + 5,
    "8x, 6 images": 20 + 240 + 5,
    "16x, 6 images": 20 + 144 + 5,
    "32x, 6 images": 20 + 120 + 5,
    "16x, 2 images, width 3": 20 + 9 * 48 + 9 * 5,
    "16x, 1024 tokens": 20 + 20 + 5,
    "16x, 3072 tokens": 20 + 60 + 5,
    "8x, 1024 tokens": 20 + 40 + 5,
    "8x, 3072 tokens": 20 + 120 + 5,
    "16x, 1024 tokens, width 3": 20 + 9 * 20 + 9 * 5,
}
COMMUNICATION = {  # ms: three all-reduces of 4 bytes, one of 4 MB or a reduce-scatter, an all-gather
    1: 0.3 + 0.1 + 4 + 0.1 + 2,
    2: 0.3 + 0.1 + 4 + 0.1 + 2,
    3: 0.3 + 0.1 + 6 + 0.1 + 2,
}
GATHERING = 7
"""Milliseconds of a step that ZeRO 3 adds on one process."""
PARAMETERS = 5 - 2 / 2
"""Milliseconds per million parameters: two ranks share the optimizer's 2 ms."""


def toy_size(setting) -> Size:
    """Return the work of a made-up model, with a million parameters in one tensor, by the width squared.

    An image takes 2, 1.2 or 1 GFLOP at 8x, 16x and 32x; 1024 tokens take 1 GFLOP, and attention 0.5 at 8x.
    """
    scale = setting.width**2
    flops = {
        "tokenizer": {8: (2e9,), 16: (1.2e9,), 32: (1e9,)},
        "transformer": {256: (1e9 / 4, 0.5e9 / 4), 64: (1e9 / 16, 0.0), 16: (1e9 / 64, 0.0)},
    }[setting.model]
    return Size(
        flops={key: [scale * n for n in kinds] for key, kinds in flops.items()},
        tensors=[1_000_000 * scale],
    )


def one_process(cell: Cell) -> float:
    return (ONE_PROCESS[cell.setting.name] + (GATHERING if cell.stage == 3 else 0)) / 1e3


def unseen(name: str):
    return next(setting for setting in UNSEEN if setting.name == name)


def test_a_prediction_is_the_time_that_the_formulas_give_by_hand():
    cells = plan(rounds=1)
    runs = {cell.name: {"seconds": one_process(cell) if cell.ranks == 1 else 1.0} for cell in cells}
    found = report(cells, runs, COLLECTIVES, OPTIMIZER, toy_size)
    assert found["steps"]["tokenizer, ZeRO 1"]["per_flop"] == pytest.approx([20e-12], rel=1e-3)
    for stage in (1, 3):
        rates = found["steps"][f"transformer, ZeRO {stage}"]["per_flop"]
        assert rates == pytest.approx([20e-12, 40e-12], rel=1e-3)
        assert found["steps"][f"transformer, ZeRO {stage}"]["sharded"] == pytest.approx(2e-9, rel=1e-3)
    assert found["link"]["reduce_scatter"] == pytest.approx((1e-4, 1.5e-9), rel=1e-3)
    predicted = {
        (row["model"], row["configuration"], row["stage"]): 1e3 * row["predicted"] for row in found["rows"]
    }
    images, tokens = ("tokenizer", 4 * 24, 48), ("transformer", 40, 20)
    for (model, batch, width), stage in ((images, 1), (images, 2), (tokens, 1), (tokens, 2), (tokens, 3)):
        talking = COMMUNICATION[stage]
        extra = GATHERING if stage == 3 else 0
        expected = 20 + extra + batch + PARAMETERS + talking
        assert predicted[model, "another batch", stage] == pytest.approx(expected, rel=1e-3)
        # four times the FLOPs, parameters and bytes
        expected = 20 + extra + 4 * width + 4 * PARAMETERS + 4 * (talking - 0.5) + 0.5
        assert predicted[model, "another width", stage] == pytest.approx(expected, rel=1e-3)
    draws = unseen("another mix").draws(2, 0)
    slow = sum(((8, 4),) in draw for draw in draws)
    assert 0 < slow < len(draws)
    computing = (slow * 160 + (len(draws) - slow) * 80) / len(draws)
    expected = 20 + computing + PARAMETERS + COMMUNICATION[1]
    assert predicted["tokenizer", "another mix", 1] == pytest.approx(expected, rel=1e-3)


def test_rows_show_misses_and_failed_runs():
    cells = plan(rounds=3)
    runs = {}

    def run(cell):
        if cell.ranks == 1:
            return one_process(cell)
        if cell.setting.name == "another width" and cell.stage == 3:
            raise RuntimeError("failed on rank 1: out of memory")
        by_hand = 20 + 4 * 24 + PARAMETERS + COMMUNICATION[cell.stage]
        return by_hand / 1e3 * (1.2 if cell.stage == 2 else 1.1)

    saved = []
    measure(cells, runs, run, lambda: saved.append(len(runs)))
    assert saved == list(range(1, len(cells) + 1))
    rows = report(cells, runs, COLLECTIVES, OPTIMIZER, toy_size)["rows"]
    found = {(row["model"], row["configuration"], row["stage"]): row for row in rows}
    assert len(rows) == 3 * 2 + 3 * 3
    first = found["tokenizer", "another batch", 1]
    assert first["within"]
    assert len(first["rounds"]) == 3
    second = found["tokenizer", "another batch", 2]
    assert not second["within"]
    assert line(second).endswith("(-17%) MISS")
    assert line(found["transformer", "another width", 3]).endswith("FAILED: failed on rank 1: out of memory")


def test_rounds_alternate_and_have_their_own_draws():
    two = [cell for cell in plan(3) if cell.ranks == 2]
    order = [(cell.setting.model, cell.setting.name, cell.stage) for cell in two]
    assert order[:15] == order[15:30][::-1] == order[30:]
    changes = ("another batch", "another mix", "another width")
    wanted = {"tokenizer": (1, 2), "transformer": (1, 2, 3)}
    assert set(order[:15]) == {
        (model, name, stage) for model, stages in wanted.items() for name in changes for stage in stages
    }
    assert not {cell.setting.name for cell in two} & {setting.name for setting in KNOWN}
    mix = unseen("another mix")
    assert mix.draws(2, 0) != mix.draws(2, 1)
    assert len(mix.draws(2, 0)) == mix.steps - SKIPPED_STEPS


def test_the_transformers_batches_are_those_of_its_packer():
    setting = TransformerSetting(name="mix", max_tokens=2048, ratios=[8, 32], steps=5)
    for draw in setting.draws(2, 0):
        assert len(draw) == 2
        assert all(0.9 * 2048 <= sum(tokens * count for tokens, count in batch) <= 2048 for batch in draw)
    assert TransformerSetting(name="one", max_tokens=1024, ratios=[16]).draws(1, 0)[0] == (((64, 16),),)


def test_only_missing_and_failed_runs_are_repeated(tmp_path):
    cells = plan(rounds=1)
    runs = {cells[0].name: {"seconds": 1.0}, cells[1].name: {"error": "no port"}}
    path = tmp_path / "validation.json"
    about = {"cpu": {"threads": 2}, "packages": {"torch": "2"}, "commit": "abc1234"}
    path.write_text(json.dumps({"about": about | {"missing": [cells[1].name]}, "runs": runs}))
    again = read_runs(path, about)
    ran = []
    measure(cells, again, lambda cell: ran.append(cell.name) or 1.0, lambda: None)
    assert ran == [cell.name for cell in cells[1:]]
    with pytest.raises(UserError, match="measured with another cpu"):
        read_runs(path, {**about, "cpu": {"threads": 4}})
    with pytest.raises(UserError, match="measured with another commit"):
        read_runs(path, {**about, "commit": "def5678"})
    path.write_text(json.dumps({"about": about, "runs": again, "rows": []}))
    assert read_runs(path, about) == {}
    assert read_runs(None, about) == {}


def test_a_file_with_failed_runs_is_incomplete(tmp_path, monkeypatch):
    def step_seconds(setting, folder, ranks, stage, seed):
        if (setting, ranks, stage) == (UNSEEN[0], 2, 1) and broken:
            raise RuntimeError("no port")
        return 1.0

    path, broken = tmp_path / "validation.json", [True]
    monkeypatch.setattr(scaling_validation, "step_seconds", step_seconds)
    for name in ("measure_link", "measure_optimizer"):
        monkeypatch.setattr(scaling_validation, name, dict)
    monkeypatch.setattr(scaling_validation, "report", lambda *_: {"rows": []})
    monkeypatch.setattr(machine, "commit", lambda: "abc1234")
    command = ["--json", str(path), "--rounds", "1"]
    scaling_validation.main(command)
    failed = "tokenizer, another batch, ZeRO 1, 2 ranks, round 0"
    assert json.loads(path.read_text())["about"]["missing"] == [failed]
    broken.clear()
    assert scaling_validation.main(command) == 0
    assert "missing" not in json.loads(path.read_text())["about"]


def test_a_failed_run_on_one_process_leaves_no_prediction():
    cells = plan(rounds=1)
    runs = {cell.name: {"seconds": 1.0} for cell in cells} | {cells[0].name: {"error": "killed"}}
    with pytest.raises(
        UserError, match="tokenizer, 8x, 2 images, ZeRO 1, 1 ranks, round 0: killed; the same command"
    ):
        report(cells, runs, COLLECTIVES, OPTIMIZER, toy_size)


def test_negative_coefficients_are_fitted_again_and_a_free_link_is_refused():
    measured = [
        (setting, toy_size(setting), 1e-11 * toy_size(setting).flops[16][0] * setting.batch - 1e-3)
        for setting in (TokenizerSetting(name=str(n), batch=n, shares={16: 1.0}) for n in (1, 2, 8))
    ]
    cost = fit_step(measured, OPTIMIZER)
    assert cost.fixed == cost.per_parameter == cost.sharded == 0
    ratios = [1e-11 * 1.2e9 * n / taken for (*_, taken), n in zip(measured, (1, 2, 8), strict=True)]
    expected = 1e-11 * sum(ratios) / sum(ratio**2 for ratio in ratios)
    assert cost.per_flop == pytest.approx([expected])
    with pytest.raises(UserError, match="link: all_reduce of more elements did not take longer"):
        fit_link({"all_reduce": [(1, 1 << 12, 2e-3), (1, 1 << 20, 1e-3)]})


def test_small_parameters_take_as_long_as_gathers_that_are_launched_together():
    link = fit_link(COLLECTIVES)
    large, more = (
        sum(map(link.seconds, exchanges(tensors, 3))) for tensors in ([1_000_000], [1_000_000, 50, 50])
    )
    assert more - large == pytest.approx(2e-3, rel=1e-2)


def test_the_slower_copy_of_each_step_counts(tmp_path, monkeypatch):
    def train(commands, ranks):
        for number, seconds in enumerate(
            ([9.0] * SKIPPED_STEPS + [1.0, 4.0], [9.0] * SKIPPED_STEPS + [3.0, 2.0])
        ):
            run = tmp_path / f"run_{number}"
            run.mkdir()
            lines = [json.dumps({"seconds": value}) for value in seconds]
            (run / "metrics.jsonl").write_text("\n".join(lines))

    monkeypatch.setattr(processes, "_run_ranks", train)
    setting = TokenizerSetting(name="one", batch=1, shares={16: 1.0}, steps=SKIPPED_STEPS + 2)
    assert processes.step_seconds(setting, tmp_path, 1, 1, 0) == pytest.approx(3.5)


def test_a_disturbed_step_does_not_count_and_the_mix_is_kept():
    high, low = ((8, 4),), ((32, 4),)
    draws = [(high, low), (low, high), (high, high), (low, high), (low, low)]
    # three steps of 8x and 32x, whose median is 2
    assert typical_seconds([2.0, 9.0, 3.0, 2.0, 1.0], draws) == pytest.approx((3 * 2 + 3 + 1) / 5)


@pytest.mark.slow
def test_steps_the_link_and_the_optimizer_are_measured(tmp_path):
    tokenizer = TokenizerSetting(name="small", batch=1, shares={16: 1.0}, steps=6)
    assert 0 < processes.step_seconds(tokenizer, tmp_path / "tokenizer", 2, 2, 0) < 60
    transformer = TransformerSetting(name="small", max_tokens=256, ratios=[8, 32], steps=6)
    assert 0 < processes.step_seconds(transformer, tmp_path / "transformer", 2, 3, 0) < 60
    lines = (tmp_path / "transformer/run_0/metrics.jsonl").read_text().splitlines()
    ran = [json.loads(line) for line in lines][SKIPPED_STEPS:]
    size = transformer.count()
    for record, draw in zip(ran, transformer.draws(2, 0), strict=True):
        assert record["flops"] == pytest.approx(sum(sum(size.batch_flops(batch)) for batch in draw))
    assert set(fit_link(processes.measure_link()).costs) == {*processes.COLLECTIVES, processes.TOGETHER}
    assert all(seconds > 0 for seconds in processes.measure_optimizer().values())
    alone = TransformerSetting(name="one process", max_tokens=256, ratios=[16], steps=6)
    assert 0 < processes.step_seconds(alone, tmp_path / "alone", 1, 1, 0) < 60
    assert (tmp_path / "alone/run_1/metrics.jsonl").exists()  # its copy
    with pytest.raises(RuntimeError, match="partitions weights that this task uses"):
        processes.step_seconds(tokenizer, tmp_path / "refused", 2, 3, 0)
