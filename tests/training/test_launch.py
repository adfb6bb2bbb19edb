"""`launch`, with a stand-in for the DeepSpeed launcher: arguments, progress, errors, no orphaned ranks."""

import os
import sys
import time
from pathlib import Path

import pytest

from cat_fast.errors import UserError
from cat_fast.training import launch as launching
from cat_fast.training.launch import launch
from cat_fast.training.metrics.run_log import METRICS


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """Function that replaces the interpreter by a shell script, which gets DeepSpeed's command line."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(launching, "_POLL_SECONDS", 0.02)

    def install(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/bash\ncd {tmp_path}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return install


@pytest.fixture
def start(tmp_path):
    def run(overrides=(), **changes) -> None:
        arguments = {"run_folder": tmp_path / "run", "log": tmp_path / "logs" / "log", "ranks": 2}
        launch("nano.yaml", list(overrides), **arguments | changes)

    return run


def running(pid_file: Path) -> list[int]:
    """Return the process ids in a file that are still running; zombies do not count."""
    alive = []
    for pid in map(int, pid_file.read_text().split()):
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            alive.append(pid)
    return alive


def wait_for(condition, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def record(step: int, loss: float) -> str:
    return f'echo \'{{"step": {step}, "seconds": 0.1, "loss": {loss}}}\' >> run/{METRICS}'


def test_the_launcher_gets_the_ranks_the_module_the_configuration_and_the_overrides(
    launcher, start, tmp_path
):
    launcher('printf "%s\\n" "$@" > arguments')
    start(["output_dir=a b", "seed=1"], ranks=3)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:4] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "3"]
    assert arguments[-5:] == ["--module", "cat_fast.train", "nano.yaml", "output_dir=a b", "seed=1"]


def test_on_step_is_called_as_steps_appear_and_for_the_last_one(launcher, start):
    launcher(f"mkdir run; {record(0, 3.0)}; sleep 0.3; {record(1, 2.0)}; {record(2, 1.0)}")
    seen = []
    start(on_step=lambda done, metrics: seen.append((done, metrics["loss"])))
    assert seen[0] == (1, 3.0)
    assert seen[-1] == (3, 1.0)


def test_the_output_of_the_run_is_appended_to_the_log(launcher, start, tmp_path, capfd):
    log = tmp_path / "logs" / "log"
    log.parent.mkdir()
    log.write_text("of an earlier run\n")
    launcher("echo printed; echo warned >&2")
    start()
    assert log.read_text() == "of an earlier run\nprinted\nwarned\n"
    assert capfd.readouterr() == ("", "")


def test_the_error_of_a_failed_run_quotes_its_error_line(launcher, start, tmp_path):
    launcher("echo starting; echo 'error: data.index: no such file' >&2; echo bye; exit 2")
    with pytest.raises(UserError, match=r"exit code 2: error: data\.index: no such file") as caught:
        start()
    assert str(tmp_path / "logs" / "log") in str(caught.value)


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ("Traceback; RuntimeError: out of memory", "RuntimeError: out of memory"),
        ("error (rank 1): the latents are damaged", "error (rank 1): the latents are damaged"),
    ],
)
def test_an_error_of_any_rank_is_found(launcher, start, printed, message):
    launcher(f"echo '{printed}'; exit 1")
    with pytest.raises(UserError) as caught:
        start()
    assert message in str(caught.value)


def test_an_error_of_an_earlier_run_in_the_same_log_is_ignored(launcher, start):
    launcher("echo 'error: the disk is full'; exit 2")
    with pytest.raises(UserError, match="the disk is full"):
        start()
    launcher("kill -9 $$")
    with pytest.raises(UserError, match="no error was printed") as caught:
        start()
    assert "disk" not in str(caught.value)


LEAVES_A_RANK = "sleep 600 & echo $! > pids; echo $$ >> pids"


@pytest.mark.parametrize("ending", ["exit 0", "exit 3", "kill -9 $$"])
def test_a_rank_does_not_outlive_its_launcher(launcher, start, tmp_path, ending):
    launcher(f"{LEAVES_A_RANK}; {ending}")
    if ending == "exit 0":
        start()
    else:
        with pytest.raises(UserError):
            start()
    assert wait_for(lambda: not running(tmp_path / "pids"))


@pytest.mark.parametrize("stubborn", ["", "trap '' TERM;"])
def test_ctrl_c_ends_the_ranks_before_it_propagates(launcher, start, tmp_path, monkeypatch, stubborn):
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 0.2)
    launcher(f"{stubborn} {LEAVES_A_RANK}; mkdir run; {record(0, 1.0)}; while true; do sleep 0.1; done")
    noted = []

    def interrupt(done: int, metrics: dict[str, float]) -> None:
        noted.extend(running(tmp_path / "pids"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(on_step=interrupt)
    assert len(noted) == 2
    assert os.getpid() not in noted
    assert wait_for(lambda: not running(tmp_path / "pids"))
