"""A rank that is slow by itself is named; one that only waits for it is not."""

import time

from cat_fast.training.config.settings import RunConfig, ScheduleConfig, SlowRanksConfig
from cat_fast.training.health.stragglers import METRIC, SlowRanks
from cat_fast.training.loop import run
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.runtime.ranks import Ranks
from tests.training.health.test_watchdog import Meeting
from tests.training.rank_processes import gloo_ranks, run_ranks


class Sleepy(Meeting):
    """Rank 1 is slow from step 6 to step 11; in every step both wait for each other."""

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


def test_a_slow_rank_is_warned_of_while_it_is_slow_and_measured(tmp_path):
    outputs = run_ranks("tests.training.health.test_stragglers:train", 2, tmp_path)
    warnings = [line for line in outputs[0].splitlines() if line.startswith("warning: rank")]
    assert len(warnings) == 1, outputs[0]
    assert warnings[0].startswith("warning: rank 1 (")
    assert "in 6 steps" in warnings[0]
    assert "warning: rank" not in outputs[1]
    windows = [record for record in read_metrics(tmp_path) if METRIC in record]
    assert [record["step"] for record in windows] == [5, 11, 17]
    assert windows[1]["slowest_rank"] == 1
    assert windows[1][METRIC] > 3 > max(windows[0][METRIC], windows[2][METRIC])


def test_own_time_ends_where_a_rank_first_waits_and_the_first_step_is_left_out():
    ranks = Ranks()
    slow_ranks = SlowRanks(SlowRanksConfig(every_steps=4), ranks)
    for step in range(3):
        ranks.work.begin(step)
        time.sleep(0.05 if step == 0 else 0.0)
        ranks.work.computed()
        time.sleep(0.05)
        ranks.work.computed()
        assert slow_ranks.compare(slow_ranks.own_time()) == {}  # of one rank there is nothing to say
    own = ranks.work.take_own_seconds()
    assert len(own) == 2
    assert max(own) < 0.05
    assert ranks.work.take_own_seconds() == []


def test_own_time_is_what_is_left_of_a_step_without_its_waits():
    work = Ranks().work
    for step in range(2):
        work.begin(step)
        time.sleep(0.02)
        work.computed()
        assert work.waiting
        time.sleep(0.2)
        work.resumed()
        assert not work.waiting
        time.sleep(0.02)
        work.computed()
    own = work.take_own_seconds()
    assert len(own) == 2
    assert all(0.04 <= seconds < 0.2 for seconds in own)


def test_one_rank_alone_does_not_gather_times_for_ever():
    ranks = Ranks()
    slow_ranks = SlowRanks(SlowRanksConfig(every_steps=4), ranks)
    for step in range(10):
        ranks.work.begin(step)
        ranks.work.computed()
        slow_ranks.own_time()
    assert len(ranks.work.take_own_seconds()) == 2
