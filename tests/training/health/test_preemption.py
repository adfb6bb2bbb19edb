"""Preemption: whichever process gets the signal, the run saves and prints the command that resumes it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.shared.random_latents import write_latents
from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.health.heartbeat import read_heartbeats
from cat_fast.training.health.preemption import SIGNALS, Preemption, launchers, resume_command
from cat_fast.training.health.run_status import summarize
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.runtime.ranks import Ranks
from tests.processes.survivors import wait_for
from tests.training.rank_processes import run_ranks, started_ranks
from tests.training.runs import command, finish, settings, start, train_as_rank

STEPS = 300
SCHEDULE = (f"schedule.total_steps={STEPS}", "checkpoint.every_steps=1000")
"""Only preemption saves a checkpoint before the end."""


def preempt(run: Path, log: Path, process: subprocess.Popen, done: int, target: str, kind: int) -> None:
    """Send a signal to a rank, DeepSpeed's per-node launcher or the command above it, after `done` more
    steps."""
    deadline = time.monotonic() + 300
    before = len(read_metrics(run))
    while len(read_metrics(run)) < before + done:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    ranks = [psutil.Process(beat.pid) for beat in read_heartbeats(run)]
    assert len(ranks) == 2
    chosen = {"rank 1": ranks[1], "launcher": ranks[1].parent(), "command": psutil.Process(process.pid)}
    assert target != "launcher" or "deepspeed.launcher.launch" in chosen[target].cmdline()
    chosen[target].send_signal(kind)
    process.wait(timeout=60)
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() for rank in ranks), log.read_text()


def saved(run: Path) -> int:
    found = CheckpointStore(run / "checkpoints", Ranks()).latest()
    assert found
    return found[0]


@pytest.mark.slow
def test_a_signal_to_any_process_makes_all_ranks_save_and_the_printed_command_resumes(tmp_path):
    latents = write_latents(tmp_path / "latents")
    run, uninterrupted, log = tmp_path / "run", tmp_path / "uninterrupted", tmp_path / "log"
    first = command("generator", run, latents, *SCHEDULE)

    process = start(first, log)
    preempt(run, log, process, 20, "rank 1", signal.SIGUSR1)
    assert process.returncode == 0, log.read_text()
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("preempted (")]
    done = len(read_metrics(run))
    assert line.startswith(
        f"preempted (SIGUSR1) after step {done} of {STEPS}: checkpoint saved; resume with: "
    )
    assert saved(run) == done < STEPS
    again = shlex.split(line.partition("resume with: ")[2])
    assert again[1:] == first[1:]  # the interpreter's path may be absolute
    state = summarize(run)
    assert state
    assert (state.state, state.reason, state.step) == ("preempted", "SIGUSR1", done)
    assert shlex.join(again) in state.resume

    process = start(again, log)
    preempt(run, log, process, 20, "launcher", signal.SIGTERM)
    assert saved(run) == len(read_metrics(run)) >= done + 20
    assert f"preempted (SIGTERM) after step {saved(run)}" in log.read_text()
    assert "Traceback" not in log.read_text()

    process = start(again, log)
    preempt(run, log, process, 20, "command", signal.SIGTERM)
    assert saved(run) == len(read_metrics(run)) >= done + 40
    assert f"preempted (the launcher died) after step {saved(run)}" in log.read_text()

    finish(start(again, log), log)
    run_ranks(
        "tests.training.runs:train_as_rank", 2, *settings("generator", uninterrupted, latents, *SCHEDULE)
    )
    assert summarize(run).state == "finished"
    name = "model/diffusion_pytorch_model.safetensors"
    resumed_weights, expected_weights = load_file(run / name), load_file(uninterrupted / name)
    assert all(torch.equal(resumed_weights[key], value) for key, value in expected_weights.items())
    losses = [[r["loss"] for r in read_metrics(folder)] for folder in (run, uninterrupted)]
    assert losses[0] == losses[1]


def train_with_slow_checkpoints(marker: str, *arguments: str) -> None:
    """Train as a rank that creates a file when it starts to write a checkpoint, which takes a while."""
    save = CheckpointStore.save

    def slow(store: CheckpointStore, step: int, write: Callable[[Path], None]) -> None:
        def slow_write(folder: Path) -> None:
            Path(marker).touch()
            time.sleep(0.5)
            write(folder)

        save(store, step, slow_write)

    CheckpointStore.save = slow
    train_as_rank(*arguments)


def test_signals_at_start_up_in_a_step_and_during_a_checkpoint_lose_no_saved_step(tmp_path):
    latents, marker = write_latents(tmp_path / "latents"), tmp_path / "marker"
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    schedule = ("schedule.total_steps=100", "checkpoint.every_steps=30")
    train = "tests.training.runs:train_as_rank"
    arguments = settings("generator", run, latents, *schedule)

    with started_ranks(train, 2, *arguments) as ranks:
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        assert [rank.wait(20) for rank in ranks] == [-signal.SIGTERM] * 2
    assert read_metrics(run) == []

    with started_ranks(train, 2, *arguments) as ranks:
        assert wait_for(lambda: len(read_metrics(run)) >= 3, 100), ranks[0].output()
        ranks[1].send_signal(signal.SIGHUP)
        assert [rank.wait(60) for rank in ranks] == [0, 0]
        assert "preempted (SIGHUP)" in ranks[0].output()
    assert 3 <= saved(run) == len(read_metrics(run)) < 100

    with started_ranks(f"{__name__}:train_with_slow_checkpoints", 2, marker, *arguments) as ranks:
        assert wait_for(marker.exists, 100), ranks[0].output()
        ranks[0].send_signal(signal.SIGINT)
        assert [rank.wait(60) for rank in ranks] == [130, 130]
    assert saved(run) == len(read_metrics(run)) < 100

    run_ranks(train, 2, *arguments)
    run_ranks(train, 2, *settings("generator", uninterrupted, latents, *schedule))
    losses = [[r["loss"] for r in read_metrics(folder)] for folder in (run, uninterrupted)]
    assert len(losses[0]) == 100
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", SIGNALS)
def test_signals_are_recorded_only_while_listening(kind):
    before = signal.getsignal(kind)
    preemption = Preemption()
    with preemption.listening():
        assert not preemption.requested
        os.kill(os.getpid(), kind)
        assert preemption.requested
        assert preemption.reason == kind.name
    assert signal.getsignal(kind) is before


def test_a_closed_terminal_is_ignored_under_nohup(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", {signal.SIGHUP: signal.SIG_IGN}.get)
    installed = []
    monkeypatch.setattr(signal, "signal", lambda kind, handler: installed.append(kind))
    with Preemption().listening():
        assert set(installed) == set(SIGNALS) - {signal.SIGHUP}


def test_a_second_ctrl_c_interrupts_at_once():
    with Preemption().listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_dead_launcher_is_a_reason_to_stop_and_a_missing_one_is_not(tmp_path):
    script = (
        "import time\n"
        "from cat_fast.training.health.preemption import Preemption, launchers\n"
        "p = Preemption()\n"
        "print(len(launchers()), p.requested, flush=True)\n"
        "input()\n"
        "print(p.requested, p.reason, flush=True)\n"
    )
    module = tmp_path / "deepspeed" / "launcher"
    module.mkdir(parents=True)
    for folder in (module.parent, module):
        (folder / "__init__.py").touch()
    (module / "launch.py").write_text(
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "deepspeed.launcher.launch", script],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == "1 False\n"
    process.kill()  # not reaped yet: a zombie counts as dead
    time.sleep(0.1)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "True the launcher died\n"
    process.wait()
    assert launchers() == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "python -m cat_fast.train 'a b.yaml' seed=1"),
        (
            {"WORLD_SIZE": "16", "SLURM_JOB_ID": "7"},
            "sbatch scripts/launch/slurm.sbatch 'a b.yaml' seed=1",
        ),
        (
            {"WORLD_SIZE": "8", "LOCAL_SIZE": "8"},
            "deepspeed --num_gpus 8 --module cat_fast.train 'a b.yaml' seed=1",
        ),
        (
            {"WORLD_SIZE": "16", "LOCAL_SIZE": "8"},
            "deepspeed --hostfile HOSTFILE --num_nodes 2 --num_gpus 8 --module cat_fast.train 'a b.yaml' "
            "seed=1",
        ),
    ],
)
def test_without_a_launcher_the_resume_command_is_rebuilt_from_the_environment(
    monkeypatch, environment, expected
):
    monkeypatch.setattr(sys, "executable", "/usr/bin/python")
    for name in ("WORLD_SIZE", "LOCAL_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resume_command(["a b.yaml", "seed=1"]) == expected
