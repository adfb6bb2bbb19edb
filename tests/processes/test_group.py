"""Commands with a process group: signals at every phase, a second signal, kills, nohup and make."""

import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from tests.processes.stand_ins import CHECKPOINT, MODULE, PHASES, STARTING, STEP
from tests.processes.survivors import processes_naming, wait_for

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL)
NOTICE_SECONDS = 10
"""Within this time, processes notice that their command was killed."""
MAX_START_SECONDS = 60


def start(folder: Path, phase: str, seconds: float = 0.3, *wrapper: str) -> subprocess.Popen:
    """Start the stand-in command, and wait until its ranks are in the phase."""
    folder.mkdir()
    arguments = [
        sys.executable,
        "-m",
        "tests.processes.stand_ins",
        "command",
        str(folder),
        phase,
        str(seconds),
    ]
    log = (folder / "log").open("w")
    return subprocess.Popen([*wrapper, *arguments], cwd=ROOT, stdout=log, stderr=log, process_group=0)


def reach(folder: Path, phase: str) -> None:
    for number in range(2):
        marker = folder / f"{phase}-{number}"
        assert wait_for(marker.exists, MAX_START_SECONDS), (folder / "log").read_text()
    assert len(processes_naming(folder)) > 2, "they are found while they run"


def num_saved(folder: Path) -> int:
    return len(list(folder.glob("saved-*")))


def assert_ended(folder: Path, seconds: float) -> None:
    assert wait_for(lambda: not processes_naming(folder), seconds), processes_naming(folder)


CASES = list(product(SIGNALS, PHASES))


@pytest.fixture(scope="module")
def signalled(tmp_path_factory):
    """Start a command per case, all at the same time, and signal each one in its phase."""
    root = tmp_path_factory.mktemp("signalled")
    commands = {}
    for kind, phase in CASES:
        folder = root / f"{kind.name}-{phase}"
        commands[kind, phase] = folder, start(folder, phase)
    for (kind, phase), (folder, process) in commands.items():
        reach(folder, phase)
        process.send_signal(kind)
    return commands


@pytest.mark.parametrize(("kind", "phase"), CASES)
def test_a_signal_lets_the_ranks_save_and_leaves_no_process(signalled, kind, phase):
    folder, process = signalled[kind, phase]
    assert process.wait(MAX_START_SECONDS) == (-kind if kind == signal.SIGKILL else 128 + kind)
    assert_ended(folder, NOTICE_SECONDS)
    assert num_saved(folder) == (0 if phase == STARTING else 2)
    log = (folder / "log").read_text()
    assert ("waiting at most 60 s" in log) == (phase != STARTING)
    if kind != signal.SIGKILL:
        assert log.splitlines()[-1].startswith(f"interrupted ({kind.name}): ")
    assert "Traceback" not in log


@pytest.mark.parametrize("phase", [STEP, CHECKPOINT])
def test_a_second_signal_cuts_the_wait_short(tmp_path, phase):
    folder = tmp_path / "run"
    process = start(folder, phase, 300)
    reach(folder, phase)
    process.send_signal(signal.SIGTERM)
    assert wait_for(lambda: "waiting" in (folder / "log").read_text(), 10)
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert_ended(folder, 0)
    assert num_saved(folder) == 0


def test_a_signal_that_arrives_twice_at_once_is_one_request(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, STEP, 1)
    reach(folder, STEP)
    for kind in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):  # as a closed terminal or `timeout` do
        process.send_signal(kind)
        time.sleep(0.05)
    assert process.wait(20) == 128 + signal.SIGHUP
    assert_ended(folder, 0)
    assert num_saved(folder) == 2


def test_ranks_that_do_not_save_in_time_are_killed(tmp_path):
    script = (
        "import sys\nfrom cat_fast.processes import ending\nfrom tests.processes import stand_ins\n"
        "ending.GRACE_SECONDS = 0.5\n"
        "sys.exit(stand_ins.command(*sys.argv[1:]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path), STEP, "300"], cwd=ROOT) as process:
        reach(tmp_path, STEP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    assert_ended(tmp_path, 0)
    assert num_saved(tmp_path) == 0


def test_a_group_ends_when_its_guard_is_killed(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, STEP)
    reach(folder, STEP)
    os.kill(guard_of(process), signal.SIGKILL)
    assert process.wait(20) == 256 - signal.SIGKILL  # the exit code of the command is that of its guard
    assert_ended(folder, 0)
    assert num_saved(folder) == 2


def guard_of(process: subprocess.Popen) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (guard,) = [int(pid) for pid in children]
    return guard


def test_nohup_keeps_a_closed_terminal_from_ending_the_command(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, STEP, 0.3, "nohup")
    reach(folder, STEP)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert num_saved(folder) == 2


@pytest.mark.parametrize("kind", SIGNALS)
def test_signals_to_make_reach_its_target(tmp_path, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    makefile = tmp_path / "Makefile"
    recipe = f"{sys.executable} -m {MODULE} command {folder} {STEP} 0.3"
    makefile.write_text(f"target:\n\t{recipe}\n")
    # make does not handle signals that it inherits as ignored.
    enable = "import os, sys\nfrom signal import *\nsignal(SIGINT, SIG_DFL)\nos.execvp('make', sys.argv[1:])"
    make = subprocess.Popen(
        [sys.executable, "-c", enable, "make", "-f", str(makefile)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    reach(folder, STEP)
    make.send_signal(kind)
    assert make.wait(20) != 0
    assert_ended(folder, NOTICE_SECONDS)
    assert num_saved(folder) == 2


def test_the_module_runs_a_command_and_exits_with_its_exit_code(tmp_path):
    def run(*command: str) -> int:
        module = [sys.executable, "-m", "cat_fast.processes.group"]
        return subprocess.run([*module, *command], cwd=ROOT, check=False).returncode

    assert run("sh", "-c", "exit 7") == 7
    assert run("sh", "-c", "kill -9 $$") == 128 + signal.SIGKILL
