"""The schedulers that the engine is compared with, on a clock of one second per step, and the goals."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import serving
from benchmarks.documents import serving as document
from benchmarks.schedules.arrivals import MIXES, draw_requests, poisson
from benchmarks.schedules.clock import Clock
from benchmarks.schedules.goals import BASELINES, goals
from benchmarks.schedules.policies import DeficitRoundRobin, DynamicBatching, FifoStepBatching, Job
from benchmarks.schedules.serve import run
from benchmarks.shared import headlines, machine
from cat_fast.generator import SampleRequest
from cat_fast.inference.engine import EngineRequest


class OneSecond:
    """Stages of which every step takes one second."""

    def __init__(self, clock):
        self.clock, self.steps = clock, []

    def prepare(self, request):
        return SimpleNamespace(request=request)

    def denoise_step(self, states):
        self.clock.advance(1.0)
        self.steps.append([state.request.sample.seed for state in states])
        return [None] * len(states)

    def scheduler_step(self, state, prediction):
        pass

    def latent(self, state):
        return None

    def decode(self, latents, ratio):
        return []


def request(seed, ratio=16, steps=3, side=2):
    sample = SampleRequest(label=0, ratio=ratio, grid=(side, side), seed=seed)
    return EngineRequest(sample=sample, num_inference_steps=steps, guidance_scale=1.0)


def serve(policy, *arrivals):
    """Return the times of the ends, and the requests of each step."""
    clock = Clock(None)
    stages = OneSecond(clock)
    jobs, totals = run(policy, stages, arrivals, clock)
    assert totals["steps"] == len(stages.steps)
    return [job.finished for job in jobs], stages.steps


def test_dynamic_batches_wait_and_run_to_the_end():
    ends, steps = serve(
        DynamicBatching(100, wait=1.0), (0.0, request(0)), (0.5, request(1)), (1.5, request(2))
    )
    assert ends == [4.0, 4.0, 7.0]
    assert steps == [[0, 1]] * 3 + [[2]] * 3


def test_a_full_dynamic_batch_does_not_wait():
    ends, _ = serve(DynamicBatching(8, wait=50.0), (0.0, request(0)), (0.5, request(1)))
    assert ends == [3.5, 3.5]


def test_fifo_step_batching_is_blocked_by_another_ratio():
    ends, _ = serve(FifoStepBatching(100), (0.0, request(0)), (0.1, request(1, ratio=32)), (0.2, request(2)))
    assert ends == [3.0, 6.0, 9.0]


def test_fifo_step_batching_lets_equal_requests_join():
    ends, steps = serve(FifoStepBatching(100), (0.0, request(0)), (0.1, request(1)))
    assert ends == [3.0, 4.0]
    assert steps == [[0], [0, 1], [0, 1], [1]]


@pytest.mark.parametrize(
    "policy", [DynamicBatching(100, wait=0.0), FifoStepBatching(100), DeficitRoundRobin(100)]
)
def test_a_request_ends_with_its_own_image(policy):
    """As in the engine, not with the last image of its batch."""

    class SlowDecoder(OneSecond):
        def decode(self, latents, ratio):
            self.clock.advance(10.0)
            return []

    clock = Clock(None)
    jobs, _ = run(policy, SlowDecoder(clock), [(0.0, request(seed)) for seed in range(3)], clock)
    assert [job.finished for job in jobs] == [13.0, 23.0, 33.0]


def test_waits_count_from_the_first_step_after_the_arrival():
    clock = Clock(None)
    arrivals = [(0.0, request(0, steps=5)), (1.5, request(1, ratio=32)), (4.5, request(2))]
    jobs, _ = run(FifoStepBatching(100), OneSecond(clock), arrivals, clock)
    assert [job.longest_wait for job in jobs] == [0, 3, 3]


def test_deficit_round_robin_fills_steps_of_several_sizes():
    policy = DeficitRoundRobin(16)
    jobs = [Job(request(seed, side=side), 0.0) for seed, side in enumerate((3, 2, 2, 1))]
    for job in jobs:
        policy.arrive(job)
    assert policy.choose(0.0) == [jobs[0], jobs[1], jobs[3]]  # 9 + 4 + 1 rows; another 4 do not fit


def test_deficit_round_robin_takes_turns():
    ends, steps = serve(
        DeficitRoundRobin(4), (0.0, request(0, steps=2)), (0.0, request(1, ratio=32, steps=2))
    )
    assert ends == [3.0, 4.0]
    assert steps == [[0], [1], [0], [1]]


def test_requests_follow_the_mix_and_the_load():
    requests = draw_requests(MIXES["cat"], 2000, seed=0)
    shares = [sum(one.sample.ratio == ratio for one in requests) / 2000 for ratio in (8, 16, 32)]
    assert shares == pytest.approx([0.06, 0.49, 0.45], abs=0.03)
    assert {one.num_inference_steps for one in requests} == {5, 10, 25, 50}
    times = [time for time, _ in poisson(requests, 4.0, seed=0)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(500, rel=0.1)


def test_goals_are_met_or_not():
    common = {"p50": 1.0, "p95": 2.0, "p99": 3.0, "within_three_times_alone": 0.5, "images_per_second": 1.0}
    slow = common | {"p50": 4.0, "p95": 8.0, "within_three_times_alone": 0.2}
    engine = common | {
        "of_flop_bound": 0.95, "fill_waiting": 0.97, "overhead": 0.02,
        "prediction_error_alone": 0.05, "prediction_error_shared": 0.3,
    }  # fmt: skip
    median = {"engine": engine, "engine_again": engine, "engine_fifo_packed": common}
    median |= dict.fromkeys(BASELINES, slow)
    found = goals(median, 0.8, predicted=False)
    assert [name for name, goal in found.items() if not goal["met"]] == ["prediction_error_shared"]
    missed = [name for name, goal in goals(median, 2.0, predicted=False).items() if not goal["met"]]
    assert missed == ["throughput over fifo_step_batching"]
    predicted = goals(median, 2.0, predicted=True)
    assert [predicted[f"throughput over {name}"]["goal"] for name in BASELINES] == [1.1, 2.0, 1.3]


def test_a_baseline_that_reaches_nothing_leaves_the_ratio_without_limit(tmp_path):
    engine = {"images_per_second": 1.0, "p50": 1.0, "p95": 2.0, "p99": 3.0, "within_three_times_alone": 0.5}
    never = engine | {"within_three_times_alone": 0.0}
    median = dict.fromkeys(("engine", "engine_again", "engine_fifo_packed", *BASELINES), engine)
    median["dynamic_batching"] = never
    found = goals(median, 0.8, predicted=True)
    name = "share within three times alone over dynamic_batching"
    assert found[name]["met"]
    assert not goals(median | {"engine": never}, 0.8, predicted=True)[name]["met"], "nor does the engine"
    file = tmp_path / "serving.json"
    serving.write_results(file, {"mixes": {"cat": {"0.8": {"goals": found, "rate": 0.123456}}}})
    written = json.loads(file.read_text())
    load = written["mixes"]["cat"]["0.8"]
    assert (load["goals"][name]["value"], load["rate"]) == (None, 0.1235)
    table = document.goals(written["mixes"])
    assert f"| 6/49/45 | 0.8 × | {name.replace('_', ' ')} | no limit | 1.5 | yes |" in table
    assert headlines.found_in({"serving": written}) == []


def test_an_interrupted_run_measures_only_the_loads_that_are_left(tmp_path, monkeypatch):
    file, measured = tmp_path / "serving.json", []

    def measure(bench, mix, load, **effort):
        if len(measured) == 2:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append((mix, load))
        return {"load": load, "goals": {}}

    monkeypatch.setattr(serving, "measure", measure)
    monkeypatch.setattr(machine, "commit", lambda: "abc1234")
    with pytest.raises(KeyboardInterrupt):
        serving.main(["--simulate", "--json", str(file)])
    assert json.loads(file.read_text())["about"]["missing"] == ["cat 1x", "cat 2x", "dataset_c 0.8x"]
    unfinished = file.read_bytes()
    assert serving.main(["--simulate", "--json", str(file)]) == 0
    assert measured == [
        ("cat", 0.5),
        ("cat", 0.8),
        "interrupted",
        ("cat", 1.0),
        ("cat", 2.0),
        ("dataset_c", 0.8),
    ]
    assert set(json.loads(file.read_text())["mixes"]["cat"]) == {"0.5", "0.8", "1", "2"}
    assert "missing" not in json.loads(file.read_text())["about"]
    monkeypatch.setattr(machine, "commit", lambda: "def5678")
    file.write_bytes(unfinished)
    assert serving.main(["--simulate", "--json", str(file)]) == 0
    assert measured[6:] == [one for one in measured[:6] if one != "interrupted"], "of another commit"


def test_a_goal_that_is_not_reached_is_a_miss_of_written_results(tmp_path, monkeypatch, capsys):
    file = tmp_path / "serving.json"
    found = {"goals": {name: {"value": 1.0, "goal": 1.1, "met": name == "a"} for name in ("a", "b")}}
    monkeypatch.setattr(serving, "measure", lambda *given, **effort: found)
    assert serving.main(["--simulate", "--quick", "--json", str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "goal not reached: cat 2x: b"
    written = json.loads(file.read_text())
    assert written["mixes"] == {"cat": {"2": found}}
    assert written["about"]["quick"]
