"""`cat-fast demo --quick` with the DeepSpeed launcher: a signal in any phase leaves no process."""

import signal
import subprocess
from pathlib import Path

import pytest

from cat_fast.training.checkpoints.store import CheckpointStore, checkpoints_in
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.runtime.ranks import Ranks
from tests.demo.test_story import start
from tests.processes.survivors import processes_naming, wait_for

PHASES = ("launchers", "ranks", "step", "checkpoint")
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL)
STEPS = ["--tokenizer-steps", "400"]
START_SECONDS = 900  # of a machine that does other work as well
NOTICE_AND_SAVE_SECONDS = 30


def is_in(phase: str, out: Path, before: int) -> bool:
    run = out / "runs" / "tokenizer"
    if phase == "step":
        return len(read_metrics(run)) > before
    if phase == "checkpoint":
        return bool(list((run / "checkpoints").glob(".step_*.part")))
    module = {"launchers": "deepspeed.launcher", "ranks": "-m cat_fast.train "}[phase]
    return any(module in command and "guard" not in command for command in processes_naming(out))


def wait_until(process: subprocess.Popen, phase: str, out: Path, before: int) -> bool:
    """Wait until the demo is in a phase or has ended."""
    return wait_for(lambda: process.poll() is not None or is_in(phase, out, before), START_SECONDS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_to_the_demo_ends_all_its_processes_and_it_resumes(tmp_path, kind):
    """One demo is signalled and resumed in each phase in turn."""
    out, run = tmp_path / "out", tmp_path / "out" / "runs" / "tokenizer"
    for phase in PHASES:
        before = len(read_metrics(run))
        process = start(out, *STEPS)
        try:
            assert wait_until(process, phase, out, before)
            process.send_signal(kind)
            _, errors = process.communicate(timeout=90)
        finally:
            process.kill()
        assert process.returncode == (-kind if kind == signal.SIGKILL else 128 + kind), errors
        seconds = NOTICE_AND_SAVE_SECONDS if kind == signal.SIGKILL else 0
        assert wait_for(lambda: not processes_naming(out), seconds), processes_naming(out)
        assert "Traceback" not in errors
        assert not list((run / "checkpoints").glob(".step_*.part"))
        records = [record["step"] for record in read_metrics(run)]
        assert records == list(range(len(records)))
        if phase in ("step", "checkpoint"):
            assert len(records) > before
            latest = CheckpointStore(run / "checkpoints", Ranks()).latest()
            assert latest
            assert latest[0] == len(records)
            if kind != signal.SIGKILL:
                assert f"the checkpoint after step {len(records)} of 400 is saved" in errors
        else:
            assert checkpoints_in(run / "checkpoints") == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_second_demo_in_the_folder_of_a_live_one_is_refused_with_its_process_id(tmp_path):
    out = tmp_path / "out"
    process = start(out, *STEPS)
    try:
        assert wait_until(process, "step", out, 2)
        second = start(out, *STEPS)
        _, errors = second.communicate(timeout=START_SECONDS)
        assert second.returncode == 2
        assert f"process {process.pid} on " in errors
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=90)
