"""Straggler detection: a slow rank is named; a rank that only waits for it is not."""

import time

from cat_fast.training.config.settings import RunConfig, ScheduleConfig, SlowRanksConfig
from cat_fast.training.health.stragglers import METRIC, StragglerDetector
from cat_fast.training.loop import run
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.runtime.ranks import Ranks
from tests.training.health.test_watchdog import Meeting
from tests.training.rank_processes import gloo_ranks, run_ranks


class Sleepy(Meeting):
    """A task whose rank 1 is slow in steps 6 to 11; in every step both ranks wait for each other."""

    def train_step(self, step: int) -> dict[str, float]:
        time.sleep(0.3 if self.ranks.rank == 1 and 6 <= step < 12 else 0.03)
        return super().train_step(step)


def train(folder: str) -> None:
    ranks = gloo_ranks()
    config = RunConfig(
        task="sleepy",
        output_dir=folder,
        schedule=ScheduleConfig(total_steps=18),
        slow_ranks=SlowRanksConfig(every_steps=6, factor=3.0),
    )
    run(Sleepy(ranks), config, ranks)


def test_a_slow_rank_causes_one_warning_and_shows_in_the_metrics(tmp_path):
    outputs = run_ranks("tests.training.health.test_stragglers:train", 2, tmp_path)
    warnings = [line for line in outputs[0].splitlines() if line.startswith("warning: rank")]
    assert len(warnings) == 1, outputs[0]
    assert warnings[0].startswith("warning: rank 1 (")
    assert "over 6 steps" in warnings[0]
    assert "warning: rank" not in outputs[1]
    windows = [record for record in read_metrics(tmp_path) if METRIC in record]
    assert [record["step"] for record in windows] == [5, 11, 17]
    assert windows[1]["slowest_rank"] == 1
    assert windows[1][METRIC] > 3 > max(windows[0][METRIC], windows[2][METRIC])


def test_busy_time_ends_at_the_first_wait_and_excludes_the_first_step():
    ranks = Ranks()
    detector = StragglerDetector(SlowRanksConfig(every_steps=4), ranks)
    for step in range(3):
        ranks.step_context.begin(step)
        time.sleep(0.05 if step == 0 else 0.0)
        ranks.step_context.start_waiting()
        time.sleep(0.05)
        ranks.step_context.start_waiting()
        assert detector.compare(detector.busy_time()) == {}  # a single rank is not compared
    busy = ranks.step_context.pop_busy_seconds()
    assert len(busy) == 2
    assert max(busy) < 0.05
    assert ranks.step_context.pop_busy_seconds() == []


def test_busy_time_excludes_the_waits_of_a_step():
    context = Ranks().step_context
    for step in range(2):
        context.begin(step)
        time.sleep(0.02)
        context.start_waiting()
        assert context.is_waiting
        time.sleep(0.2)
        context.stop_waiting()
        assert not context.is_waiting
        time.sleep(0.02)
        context.start_waiting()
    busy = context.pop_busy_seconds()
    assert len(busy) == 2
    assert all(0.04 <= seconds < 0.2 for seconds in busy)


def test_a_single_rank_does_not_accumulate_times():
    ranks = Ranks()
    detector = StragglerDetector(SlowRanksConfig(every_steps=4), ranks)
    for step in range(10):
        ranks.step_context.begin(step)
        ranks.step_context.start_waiting()
        detector.busy_time()
    assert len(ranks.step_context.pop_busy_seconds()) == 2
