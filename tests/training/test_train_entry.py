"""Entry point of training runs: checks before training, and exit codes."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.shared.random_latents import write_latents
from cat_fast.data.folder_lock import locked
from cat_fast.errors import UserError
from cat_fast.train import train
from cat_fast.training.health.run_status import summarize
from cat_fast.training.metrics.run_log import read_metrics
from tests.training.runs import GENERATOR, ROOT


def test_a_preset_with_another_number_of_ranks_is_rejected(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = tmp_path / "preset.yaml"
    path.write_text("task: tokenizer\noutput_dir: runs/x\nworld_size: 64\n")
    with pytest.raises(UserError, match=r"expected 64 ranks \(world_size\), got 1: start 64 ranks"):
        train(str(path), [])


def test_a_folder_with_a_live_run_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config, *overrides = GENERATOR
    with (
        locked(tmp_path, "training"),
        pytest.raises(UserError, match=rf"process {os.getpid()} on \S+ is training here"),
    ):
        train(str(ROOT / config), [f"output_dir={tmp_path}", "data.latents=missing", *overrides])


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_that_gets_a_signal_saves_and_prints_the_command_that_resumes_it(tmp_path, kind, code):
    run = tmp_path / "run"
    config, *overrides = GENERATOR
    given = [
        *(config, f"output_dir={run}", *overrides, f"data.latents={write_latents(tmp_path / 'latents')}"),
        *("schedule.total_steps=100000", "checkpoint.every_steps=100000", "checkpoint.resume=never"),
    ]
    command = [sys.executable, "-m", "cat_fast.train", *given]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(run)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(kind)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert f"preempted ({kind.name}) after step {len(read_metrics(run))} of 100000" in output
    state = summarize(run)
    assert state
    assert state.step == len(read_metrics(run))
    # The printed command overrides `never`, so that it resumes.
    again = output.partition("resume with: ")[2]
    assert shlex.split(again)[1:] == ["-m", "cat_fast.train", *given, "checkpoint.resume=auto"]
    assert state.resume.endswith("checkpoint.resume=auto")
