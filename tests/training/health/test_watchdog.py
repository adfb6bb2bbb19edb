"""Watchdog: a hung run exits, names the suspect, and prints the stacks of every rank."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from cat_fast.training.config.settings import CheckpointConfig, RunConfig, ScheduleConfig, WatchdogConfig
from cat_fast.training.health.heartbeat import Heartbeat, now, read_heartbeats, write_heartbeat
from cat_fast.training.health.run_status import read_failure, summarize
from cat_fast.training.health.watchdog import EXIT_HUNG, Watchdog, collective_timeout
from cat_fast.training.loop import run
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.step_context import describe_batch
from tests.training.rank_processes import gloo_ranks, run_ranks, started_ranks
from tests.training.steps import PlainTask

TIMEOUT = 4.0


class Meeting(PlainTask):
    """Implementation of `loop.Task` with one collective per step, which rank 1 can skip."""

    def __init__(self, ranks: Ranks, busy_at: int = -1) -> None:
        self.ranks, self.busy_at = ranks, busy_at

    def train_step(self, step: int) -> dict[str, float]:
        self.ranks.step_context.set_batches([describe_batch([f"rank{self.ranks.rank}_step{step}.png"], 16)])
        if step == self.busy_at and self.ranks.rank == 1:
            self.stay_away()
        self.ranks.step_context.start_waiting()
        time.sleep(0.02)
        return {"loss": float(self.ranks.sum(torch.ones(())))}

    def stay_away(self) -> None:
        time.sleep(600)

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def close(self) -> None: ...

    def export(self, folder: Path) -> None:
        if self.ranks.is_main:
            folder.mkdir()


def meet(folder: str, busy_at: str = "-1") -> None:
    ranks = gloo_ranks()
    config = RunConfig(
        task="meeting",
        output_dir=folder,
        schedule=ScheduleConfig(total_steps=10**6),
        checkpoint=CheckpointConfig(every_steps=10**6),
        watchdog=WatchdogConfig(timeout_seconds=TIMEOUT),
    )
    run(Meeting(ranks, int(busy_at)), config, ranks)


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while (beats := read_heartbeats(folder)) is None or len(beats) < 2 or min(b.step for b in beats) < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stopped_rank_is_named_by_the_others_which_print_their_stacks_and_exit(tmp_path):
    with started_ranks("tests.training.health.test_watchdog:meet", 2, tmp_path) as ranks:
        wait_for_step(tmp_path, 3)
        ranks[1].send_signal(signal.SIGSTOP)
        code, output = ranks[0].wait(timeout=60), ranks[0].output()
        (silent,) = (beat for beat in read_heartbeats(tmp_path) if beat.rank == 1)
    assert code == EXIT_HUNG, output
    assert f"process {ranks[0].pid}) hangs: training" in output
    assert f"process {ranks[1].pid}) is silent: last heartbeat" in output
    assert silent.step >= 3
    assert f"in {silent.step_description}" in output
    assert "in train_step" in output or "in reduce_step" in output  # where the ranks wait for each other
    state = summarize(tmp_path)
    assert state
    assert state.state == "failed"
    assert "rank 1 (" in state.reason
    assert "is silent" in state.reason


def test_a_rank_that_is_busy_for_too_long_is_distinguished_from_those_that_wait_for_it(tmp_path):
    function = "tests.training.health.test_watchdog:meet"
    outputs = run_ranks(function, 2, tmp_path, 5, code=EXIT_HUNG, timeout=120)
    for output in outputs:
        assert "the others wait for rank 1 (" in output
        assert "busy in step 5 (16x, batch rank1_step5.png)" in output
    assert "self.ranks.sum" in outputs[0]
    assert "in stay_away" in outputs[1]


@pytest.fixture
def ended(monkeypatch):
    """Exit codes that the watchdog passed to `os._exit`, which is patched."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def test_the_watchdog_fires_before_the_process_groups_time_out():
    default = WatchdogConfig()
    assert 0 < default.timeout_seconds < 600  # NCCL's default, for groups that DeepSpeed makes
    assert collective_timeout(default).total_seconds() > default.timeout_seconds + 120
    assert collective_timeout(WatchdogConfig(timeout_seconds=0)).days >= 7


def test_progress_keeps_the_watchdog_quiet(tmp_path, ended, capfd):
    with Watchdog(tmp_path, Ranks(), timeout=0.5) as watchdog:
        for _ in range(10):
            time.sleep(0.1)
            watchdog.progress("training")
    assert ended == []
    assert capfd.readouterr().err == ""


def test_without_a_timeout_the_watchdog_only_writes_heartbeats(tmp_path, ended):
    ranks = Ranks()
    ranks.step_context.begin(7)
    with Watchdog(tmp_path, ranks, timeout=0):
        (beat,) = read_heartbeats(tmp_path)
    assert (beat.rank, beat.step, beat.pid, beat.is_waiting) == (0, 7, os.getpid(), False)
    assert ended == []


def test_a_suspended_and_continued_job_does_not_count_as_hung(tmp_path):
    pid = os.fork()
    if pid == 0:
        with Watchdog(tmp_path, Ranks(), timeout=1.0):
            time.sleep(0.3)
            (tmp_path / "ready").touch()
            time.sleep(0.3)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert read_failure(tmp_path) == ""


def test_damaged_heartbeats_are_skipped(tmp_path):
    beat = Heartbeat(rank=3, host="h", pid=1, time=now(), step=2, step_description="step 2", is_waiting=True)
    write_heartbeat(tmp_path, beat)
    (tmp_path / "heartbeats" / "rank_00004.json").write_text('{"rank": 4')
    assert read_heartbeats(tmp_path) == [beat]
