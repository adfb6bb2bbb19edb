"""The harness does not time wrong results, and reports medians of interleaved pairs for correct ones."""

import itertools
import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.shared import harness, machine, program
from benchmarks.shared.harness import Case, Contestant, Effort, Result, Spread
from cat_fast import hardware
from cat_fast.kernels import backends

ROOT = Path(__file__).parents[3]
TRUTH = (torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64),)
EFFORT = Effort(min_pairs=3, max_pairs=3, seconds=0.0)


class Clock:
    """A clock that advances only when a contestant reports time."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def __call__(self):
        return self.now

    def contestant(self, name, *seconds, off_by=0.0):
        """Takes `seconds`, call by call, the last of them again and again."""
        remaining = list(seconds)

        def run():
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]
            self.order.append(name)
            return TRUTH[0].float() + off_by

        return Contestant(run=run, outputs=lambda y: [y])


def case(clock, *, ours=(1.0,), theirs=(3.0,), ours_off_by=0.0, theirs_off_by=0.0, **work):
    return Case(
        ours=clock.contestant("ours", *ours, off_by=ours_off_by),
        baselines={"eager": clock.contestant("eager", *theirs, off_by=theirs_off_by)},
        truth=lambda: TRUTH,
        tolerance=1e-5,
        **work,
    )


@pytest.fixture
def run_program(tmp_path, capsys, monkeypatch):
    """Exit code, what was printed and the JSON, or None, of a benchmark of these cases."""
    monkeypatch.setattr(machine, "commit", lambda: "abc1234")

    def run(cases, *arguments):
        path = tmp_path / "results" / "toy.json"
        code = program.main("toy", cases, ["--quick", "--json", str(path), *arguments])
        return code, capsys.readouterr(), json.loads(path.read_text()) if path.exists() else None

    return run


def toy(**changes):
    """A case that takes real time, if hardly any."""
    return lambda: case(Clock(), **changes)


def test_turns_alternate_after_check_and_warm_up_and_peak_memory_comes_last():
    """Measuring the peak returns freed memory to the system, for which the next call would pay."""
    clock = Clock()
    harness.measure(case(clock), EFFORT, clock)
    checked, warmed, last = clock.order[:2], clock.order[2:4], clock.order[10:]
    assert checked == warmed == last == ["ours", "eager"]
    assert clock.order[4:10] == ["ours", "eager", "eager", "ours", "ours", "eager"]


def test_slow_baselines_run_in_turns_only_and_ours_keeps_its_peak():
    clock = Clock()
    result = harness.measure(
        case(clock, ours=(3.0,)), replace(EFFORT, min_pairs=1, max_pairs=1, longest_extra_run=2.0), clock
    )
    assert clock.order == ["ours", "eager", "ours", "ours", "eager", "ours"]
    assert result.peak_bytes["eager"] is None
    assert result.ratios["eager"].median == 1.0


def test_a_comparison_ends_after_a_long_turn():
    clock = Clock()
    result = harness.measure(case(clock, ours=(3.0,)), replace(EFFORT, longest_repeated_turn=2.0), clock)
    assert result.pairs == {"eager": 1}


def test_memory_of_other_processes_is_not_measured():
    clock = Clock()
    result = harness.measure(replace(case(clock), single_process=False), EFFORT, clock)
    assert result.peak_bytes == {}
    assert len(clock.order) == 10


def fails():
    raise RuntimeError("out of memory\nframe 1\nframe 2")


def test_a_baseline_that_raises_is_recorded_and_the_others_are_timed():
    clock = Clock()
    given = case(clock)
    broken = Contestant(run=fails, outputs=lambda y: [y])
    both = replace(given, baselines={"compile": broken, **given.baselines})
    result = harness.measure(both, EFFORT, clock)
    assert result.right
    assert result.failures == {"compile": "RuntimeError: out of memory"}
    assert set(result.ratios) == {"eager"}
    assert "compile FAILED: RuntimeError: out of memory" in "\n".join(harness.lines("k", result))
    result = harness.measure(replace(given, baselines={"compile": broken}), EFFORT, clock)
    assert result.seconds["ours"].median == 1.0


def test_a_case_that_raises_does_not_end_the_others(run_program):
    code, printed, written = run_program({"broken": fails, "whole": toy()})
    assert code == 1
    assert "broken: FAILED: RuntimeError: out of memory" in printed.out
    assert written["cases"]["broken"]["right"] is False
    assert written["cases"]["whole"]["right"] is True
    assert "missing" not in written["about"]
    code, printed, written = run_program({"broken": toy(), "whole": toy()}, "--keep")
    assert code == 0
    assert "whole" not in printed.out
    assert written["cases"]["broken"]["right"] is True


def test_the_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians():
    clock = Clock()
    # After the check and the warm-up: pairs of (1, 4), (2, 4) and (3, 27) seconds.
    result = harness.measure(case(clock, ours=(9, 9, 1, 2, 3), theirs=(9, 9, 4, 4, 27)), EFFORT, clock)
    assert result.ratios["eager"] == Spread(median=4.0, low=3.0, high=6.5)  # of 4, 2 and 9
    assert result.seconds["ours"] == Spread(median=2.0, low=1.5, high=2.5)
    assert result.seconds["eager"].median == 4.0
    assert result.pairs == {"eager": 3}


def test_ratios_are_per_item_and_compared_with_the_expected():
    clock = Clock()
    given = case(clock, ours=(2.0,), theirs=(3.0,), expected={"eager": 2.5}, rates={"tokens": 50})
    given = replace(
        given,
        ours=replace(given.ours, count=10),
        baselines={name: replace(one, count=5) for name, one in given.baselines.items()},
    )
    result = harness.measure(given, EFFORT, clock)
    assert result.ratios["eager"].median == 3.0  # 10 / 2 s against 5 / 3 s
    assert result.of_expected["eager"] == pytest.approx(3.0 / 2.5)
    assert result.rates == {"tokens": 25.0}
    text = "\n".join(harness.lines("toy", result))
    assert "120% of expected" in text
    assert "25 tokens/s" in text


def test_a_baseline_may_have_a_truth_of_its_own_and_be_rehearsed():
    clock = Clock()
    given = case(clock, theirs_off_by=1.0)
    (eager,) = given.baselines.values()
    shifted = (TRUTH[0] + 1,)
    for changes, right in [
        ({}, False),
        ({"truth": lambda: shifted}, True),
        ({"rehearsal": TRUTH[0].float}, True),
        ({"truth": lambda: shifted, "rehearsal": TRUTH[0].float}, False),
    ]:
        other = replace(given, baselines={"eager": replace(eager, **changes)})
        assert harness.measure(other, EFFORT, clock).right == right


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        ([5.0], Spread(5.0, 5.0, 5.0)),
        ([1.0, 2.0], Spread(1.5, 1.25, 1.75)),
        ([5.0, 1.0, 3.0, 2.0, 4.0], Spread(3.0, 2.0, 4.0)),
        ([1.0, 1.0, 1.0, 101.0], Spread(1.0, 1.0, 26.0)),
    ],
)
def test_spread_is_the_median_and_the_quartiles(values, spread):
    assert Spread.of(values) == spread


def test_pairs_go_on_for_the_seconds_given_within_their_bounds():
    for seconds, least, most, pairs in [(10, 1, 9, 3), (10, 5, 9, 5), (100, 1, 9, 9)]:
        clock = Clock()
        effort = Effort(min_pairs=least, max_pairs=most, seconds=seconds)
        assert harness.measure(case(clock), effort, clock).pairs["eager"] == pairs  # of four seconds each


def test_short_work_is_repeated_within_a_turn():
    clock = Clock()
    result = harness.measure(case(clock, ours=(harness.TURN_SECONDS / 4,)), EFFORT, clock)
    assert clock.order[4:9] == ["ours"] * 4 + ["eager"]
    assert result.seconds["ours"].median == pytest.approx(harness.TURN_SECONDS / 4)


@pytest.mark.parametrize("off_by", [1e-2, float("nan"), float("inf")])
def test_a_wrong_candidate_prints_no_speed_up_and_fails(run_program, off_by):
    code, printed, written = run_program({"right": toy(), "wrong": toy(ours_off_by=off_by)})
    assert code == 1
    about_wrong = printed.out[printed.out.index("wrong:") :]
    assert "WRONG: ours has an error of" in about_wrong
    assert "as fast as" not in about_wrong
    assert "right.ratio_vs_eager" in written
    assert "wrong.ratio_vs_eager" not in written
    assert written["cases"]["wrong"]["right"] is False
    assert written["cases"]["wrong"]["seconds"] == {}


def test_a_baseline_may_be_less_exact_but_not_do_other_work():
    for off_by, right in [(2e-5 * 4, True), (2e-4 * 4, False), (float("nan"), False)]:
        clock = Clock()
        result = harness.measure(case(clock, theirs_off_by=off_by), EFFORT, clock)
        assert result.right == right
        assert bool(result.ratios) == right


def test_nothing_wrong_is_ever_timed():
    clock = Clock()
    harness.measure(case(clock, ours_off_by=1.0), EFFORT, clock)
    assert clock.order == ["ours", "eager"]


def test_error_is_relative_to_the_largest_true_value_of_each_tensor():
    small, large = torch.tensor([0.0, 0.1]), torch.tensor([100.0, 0.0])
    assert harness.error_of([small + 0.01, large], [small, large]) == pytest.approx(0.1)
    assert harness.error_of([small, large + 0.01], [small, large]) == pytest.approx(1e-4, rel=1e-3)
    assert harness.error_of([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert harness.error_of([torch.ones(2)], [torch.zeros(2)]) == 1
    assert math.isnan(harness.error_of([torch.tensor([0.0, math.nan])], [small]))
    assert harness.error_of([small[None]], [small]) == math.inf  # a shape that would broadcast
    with pytest.raises(ValueError, match="longer"):
        harness.error_of([small], [small, large])


def test_the_work_is_reported_per_second():
    clock = Clock()
    copied = torch.zeros(250)
    result = harness.measure(case(clock, ours=(2.0,), bytes_moved=4 * 10**9, flops=6 * 10**9), EFFORT, clock)
    assert result.work == {
        "bytes_moved": 4e9, "gb_per_second": 2.0, "flops": 6e9, "gflops_per_second": 3.0
    }  # fmt: skip
    ticking = iter(range(10**6))
    result = harness.measure(
        case(Clock(), bytes_moved=6000, copied=copied), EFFORT, clock=lambda: float(next(ticking))
    )
    # By this clock every turn takes a second: ours moves 6000 bytes in one, the copy 2 * 1000.
    assert result.work["of_copy_bandwidth"] == pytest.approx(3.0)


def test_the_rate_of_a_matrix_product_is_that_of_the_largest_that_is_fast_enough(monkeypatch):
    monkeypatch.setattr(harness, "RATE_SIDES", (4, 8, 16))

    def rate(seconds_per_reading):
        readings = (reading * seconds_per_reading for reading in itertools.count())
        return harness.matmul_rate(torch.bfloat16, lambda: next(readings))

    fast = harness.RATE_SECONDS / 100
    assert rate(fast) == pytest.approx(2 * 16**3 / fast)
    slow = harness.RATE_SECONDS / 2  # 8 times the work would take longer than allowed
    assert rate(slow) == pytest.approx(2 * 4**3 / slow)


def test_the_file_holds_results_and_machine(run_program):
    code, printed, written = run_program({"op.1x2.forward": toy(flops=100), "op.1x2.backward": toy()})
    assert code == 0
    assert "as fast as eager" in printed.out
    assert {key for key in written if "." in key} == {
        "op.1x2.forward.ratio_vs_eager",
        "op.1x2.backward.ratio_vs_eager",
    }
    measured = written["cases"]["op.1x2.forward"]
    assert measured.keys() == {"right", *Result.__dataclass_fields__}
    assert measured["ratios"]["eager"].keys() == {"median", "low", "high"}
    assert measured["ratios"]["eager"]["median"] == written["op.1x2.forward.ratio_vs_eager"] > 0
    assert measured["seconds"].keys() == measured["peak_bytes"].keys() == {"ours", "eager"}
    about = written["about"]
    assert about["benchmark"] == "toy"
    assert about["packages"]["torch"] in torch.__version__
    assert about["cpu"]["threads"] == torch.get_num_threads()
    assert about.keys() >= {"date", "effort", "load_before", "load_after", "python", "platform"}


def test_the_file_names_neither_the_host_nor_a_path(monkeypatch):
    reason = "/home/someone/cat_fast/_ops.abi3.so: undefined symbol"
    monkeypatch.setattr(
        backends.Backend, "unavailable_reason", lambda self: reason if self.name != "reference" else None
    )
    described = machine.describe()
    assert "group_norm_silu.reference" in described["kernels"]
    assert not [text for text in strings(described) if "/home" in text]
    assert platform.node() not in strings(described)
    assert not [text for text in strings(described) if platform.release() in text]


def test_the_commit_is_recorded_only_of_this_repository(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip

    assert machine.commit.__wrapped__(tmp_path) is None
    (tmp_path / "inner").mkdir()
    result = tmp_path / machine.RESULTS / "a.json"
    result.parent.mkdir(parents=True)
    result.write_text("1")
    (tmp_path / "file").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = machine.commit.__wrapped__(tmp_path)
    assert clean.isalnum()
    assert machine.commit.__wrapped__(tmp_path / "inner") is None
    result.unlink()
    assert machine.commit.__wrapped__(tmp_path) == clean
    (tmp_path / "file").write_text("2")
    assert machine.commit.__wrapped__(tmp_path) == f"{clean}+"


def strings(value):
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in strings(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in strings(inner)]
    return [str(value)]


def test_only_chooses_cases_and_an_empty_choice_is_refused(run_program):
    code, printed, written = run_program({"a.forward": toy(), "b.forward": toy()}, "--only", "b.")
    assert code == 0
    assert written["cases"].keys() == {"b.forward"}
    code, printed, _ = run_program({"a.forward": toy()}, "--only", "c")
    assert code == 2
    assert printed.err.startswith("error: --only c: no case matches; expected part of one of a.forward")


def test_an_interrupted_benchmark_resumes_with_missing_cases(run_program, monkeypatch):
    """--keep measures what FILE lacks or has wrong, or --only names; a file of another machine is refused."""
    cases = {"a.forward": toy(), "b.forward": toy(), "c.forward": toy()}
    _, _, alone = run_program(cases, "--only", "b.")
    assert alone["about"]["missing"] == ["a.forward", "c.forward"]
    _, _, first = run_program({**cases, "a.forward": toy(ours_off_by=1.0)}, "--keep", "--only", "a.")
    assert first["about"]["missing"] == ["c.forward"]
    code, printed, second = run_program(cases, "--keep")
    assert code == 0
    assert "missing" not in second["about"]
    assert "b.forward" not in printed.out
    assert list(second["cases"]) == list(cases)
    assert second["cases"]["b.forward"] == first["cases"]["b.forward"]
    assert second["b.forward.ratio_vs_eager"] == first["b.forward.ratio_vs_eager"]
    assert {key.split(".ratio")[0] for key in second if "." in key} == set(cases)
    _, _, third = run_program(cases, "--keep", "--only", "c.")
    assert third["cases"]["c.forward"] != second["cases"]["c.forward"]
    assert third["cases"]["a.forward"] == second["cases"]["a.forward"]
    monkeypatch.setattr(machine, "commit", lambda: "abc1234+")
    run_program(cases)
    code, printed, _ = run_program(cases, "--keep")
    assert code == 2
    assert "was measured with uncommitted changes of abc1234+" in printed.err
    monkeypatch.setattr(harness, "QUICK", replace(harness.QUICK, max_pairs=2))
    monkeypatch.setattr(machine, "describe", lambda: {"cpu": "another", "commit": "0000000"})
    code, printed, _ = run_program(cases, "--keep")
    assert code == 2
    assert "was measured with another effort, cpu, commit; measure again without --keep" in printed.err


def test_quick_may_measure_other_cases_and_facts_stand_in_the_file(tmp_path):
    path = tmp_path / "toy.json"
    more = {"quick_cases": {"small": toy()}, "facts": lambda: {"packer": {"fill": 0.123456}}}
    program.main("toy", {"large": toy()}, ["--quick", "--json", str(path)], **more)
    found = json.loads(path.read_text())
    assert list(found["cases"]) == ["small"]
    assert found["packer"] == {"fill": 0.1235}


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    clock = Clock()
    (tmp_path / "file").touch()
    assert program.main("toy", {"a": lambda: case(clock)}, ["--json", str(tmp_path / "file" / "x.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert clock.order == []


@pytest.mark.skipif(machine.peak_bytes(lambda: None) is None, reason="the system does not report peak memory")
def test_peak_memory_is_what_a_call_holds_at_most_and_not_what_it_leaves():
    script = """
import torch
from benchmarks.shared import machine

size = 64 * 2**20  # too large for the C library's heap, whose gaps would count

def one_after_the_other():
    for _ in range(3):
        torch.ones(size, dtype=torch.uint8)

def at_once():
    return [torch.ones(size, dtype=torch.uint8) for _ in range(3)]

for _ in range(2):  # freed memory that the process kept would hide what the second round takes
    print(machine.peak_bytes(one_after_the_other) / size, machine.peak_bytes(at_once) / size)
"""
    # In a process of its own: threads of other tests would count.
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert [float(value) for value in found.stdout.split()] == pytest.approx([1, 3, 1, 3], rel=0.1)


def test_on_a_known_gpu_the_share_of_its_peak_is_reported(monkeypatch):
    gpu = hardware.Gpu(bytes_per_second=100, tensor_flops_per_second=8, float32_flops_per_second=4)
    monkeypatch.setattr(hardware, "gpu_in_use", lambda: gpu)
    clock = Clock()
    work = {"bytes_moved": 200, "flops": 16, "details": {"dtype": "bfloat16"}}
    result = harness.measure(case(clock, ours=(4.0,), **work), EFFORT, clock)
    assert (result.work["of_peak_bandwidth"], result.work["of_peak_flops"]) == (0.5, 0.5)
    assert "50% of the card's bandwidth; 50% of the card's arithmetic" in "\n".join(
        harness.lines("k", result)
    )


def test_what_an_effort_leaves_out_is_neither_checked_nor_timed():
    clock = Clock()
    both = case(clock)
    both = replace(both, baselines={**both.baselines, "compile": clock.contestant("compile", 5.0)})
    result = harness.measure(both, replace(EFFORT, without=("compile",)), clock)
    assert set(result.ratios) == {"eager"}
    assert "compile" not in clock.order
    assert harness.QUICK.without == ("compile",)
