"""What the entry point refuses before it trains, and with which code it ends."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from cat_fast.errors import UserError
from cat_fast.train import train
from cat_fast.training.health.run_status import summarize
from cat_fast.training.metrics.run_log import read_metrics
from tests.training.runs import GENERATOR, ROOT, write_latents


def test_a_preset_insists_on_its_number_of_ranks(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = tmp_path / "preset.yaml"
    path.write_text("task: tokenizer\noutput_dir: runs/x\nworld_size: 64\n")
    with pytest.raises(UserError, match="made for 64 ranks, and there are 1: start as many"):
        train(str(path), [])


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_end_saves_and_says_how_it_goes_on(tmp_path, kind, code):
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
        told, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert f"preempted ({kind.name}) after step {len(read_metrics(run))} of 100000" in told
    state = summarize(run)
    assert state
    assert state.step == len(read_metrics(run))
    # `never` was for once: what is told goes on.
    again = told.partition("go on with: ")[2]
    assert shlex.split(again)[1:] == ["-m", "cat_fast.train", *given, "checkpoint.resume=auto"]
    assert state.resume.endswith("checkpoint.resume=auto")
