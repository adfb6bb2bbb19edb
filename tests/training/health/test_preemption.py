"""Preemption: whichever process gets the signal, the run saves and prints the command that resumes it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.health.heartbeat import read_heartbeats
from cat_fast.training.health.preemption import Preemption, launchers, resume_command
from cat_fast.training.health.run_status import summarize
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.runtime.ranks import Ranks
from tests.training.rank_processes import run_ranks
from tests.training.runs import command, finish, settings, start, write_latents

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


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_recorded_only_while_listening(kind):
    before = signal.getsignal(kind)
    preemption = Preemption()
    with preemption.listening():
        assert not preemption.requested
        os.kill(os.getpid(), kind)
        assert preemption.requested
        assert preemption.reason == kind.name
    assert signal.getsignal(kind) is before


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
