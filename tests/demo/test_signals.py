"""`cat-fast demo --quick` with the DeepSpeed launcher: a signal in any phase leaves no process."""

import signal
from pathlib import Path

import pytest

from cat_fast.training.checkpoints.store import CheckpointStore, checkpoints_in
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.runtime.ranks import Ranks
from tests.demo.test_story import start
from tests.processes.survivors import processes_naming, wait_for

PHASES = ("launchers", "ranks", "step", "checkpoint")
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL)
START_SECONDS = 300
NOTICE_AND_SAVE_SECONDS = 30


def is_in(phase: str, out: Path, before: int) -> bool:
    run = out / "runs" / "tokenizer"
    if phase == "step":
        return len(read_metrics(run)) > before
    if phase == "checkpoint":
        return bool(list((run / "checkpoints").glob(".step_*.part")))
    module = {"launchers": "deepspeed.launcher", "ranks": "-m cat_fast.train "}[phase]
    return any(module in command and "guard" not in command for command in processes_naming(out))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_to_the_demo_ends_all_its_processes_and_it_resumes(tmp_path, kind, phase):
    out, run = tmp_path / "out", tmp_path / "out" / "runs" / "tokenizer"
    steps = ["--tokenizer-steps", "400"]
    process = start(out, *steps)
    assert wait_for(lambda: process.poll() is not None or is_in(phase, out, 0), START_SECONDS)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == (-kind if kind == signal.SIGKILL else 128 + kind), errors
    seconds = NOTICE_AND_SAVE_SECONDS if kind == signal.SIGKILL else 0
    assert wait_for(lambda: not processes_naming(out), seconds), processes_naming(out)
    assert "Traceback" not in errors
    assert not list((run / "checkpoints").glob(".step_*.part"))
    done = len(read_metrics(run))
    if phase in ("step", "checkpoint"):
        latest = CheckpointStore(run / "checkpoints", Ranks()).latest()
        assert latest
        assert latest[0] == done
        if kind != signal.SIGKILL:
            assert f"the checkpoint after step {done} of 400 is saved" in errors
    else:
        assert checkpoints_in(run / "checkpoints") == []

    again = start(out, *steps)
    try:
        assert wait_for(lambda: again.poll() is not None or is_in("step", out, done + 2), START_SECONDS)
        refused = start(out, *steps)
        _, errors = refused.communicate(timeout=START_SECONDS)
        assert refused.returncode == 2
        assert f"process {again.pid} on " in errors
    finally:
        again.send_signal(signal.SIGTERM)
        again.communicate(timeout=90)
    records = [record["step"] for record in read_metrics(run)]
    assert records == list(range(len(records)))
    assert len(records) > done
