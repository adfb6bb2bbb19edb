"""State of a run as seen from outside: status file, lock, heartbeats and recorded failure."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest

from cat_fast.data.folder_lock import is_locked, require_unlocked
from cat_fast.errors import UserError
from cat_fast.training.health.heartbeat import Heartbeat, now, write_heartbeat
from cat_fast.training.health.run_status import (
    STATUS,
    RunStatus,
    StatusFile,
    find_runs,
    lock_folder,
    read_failure,
    record_failure,
    summarize,
)


def begin(folder, **changes) -> StatusFile:
    folder.mkdir(parents=True, exist_ok=True)
    return StatusFile(folder, RunStatus(task="generator", total_steps=10, command="train it", **changes))


def test_a_run_is_running_while_its_lock_is_held_and_killed_if_it_is_released_without_a_reason(tmp_path):
    with lock_folder(tmp_path):
        status = begin(tmp_path)
        status.step(3, 0.5, skipped=True)
        status.write()
        run = summarize(tmp_path)
        assert run
        assert (run.state, run.step, run.loss, run.skipped, run.resume) == ("running", 3, 0.5, 1, "")
    run = summarize(tmp_path)
    assert run
    assert (run.state, run.reason) == ("killed", "it exited without recording a reason")
    assert run.resume == f"cd {os.getcwd()} && train it"


def test_the_lock_of_another_process_counts_until_it_ends(tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom cat_fast.training.health.run_status import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])):\n    print('held', flush=True)\n    input()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    assert is_locked(tmp_path)
    refusal = rf"{tmp_path}: process {process.pid} on \S+ is training here; .* kill {process.pid}$"
    with pytest.raises(UserError, match=refusal), lock_folder(tmp_path):
        pass
    with pytest.raises(UserError, match=refusal):
        require_unlocked(tmp_path, "training")
    process.kill()
    process.wait()
    assert not is_locked(tmp_path)
    require_unlocked(tmp_path, "training")


def test_checking_a_lock_does_not_keep_a_run_from_starting(tmp_path):
    with lock_folder(tmp_path):
        pass
    checking = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time\nf = open(sys.argv[1])\nfcntl.flock(f, fcntl.LOCK_SH)\n"
            "print(flush=True)\ntime.sleep(0.2)\n",
            str(tmp_path / ".lock"),
        ],
        stdout=subprocess.PIPE,
    )
    assert checking.stdout
    checking.stdout.readline()
    with lock_folder(tmp_path):
        assert is_locked(tmp_path)
    checking.wait()


def test_a_run_on_another_host_counts_as_running_while_it_writes_heartbeats(tmp_path):
    status = begin(tmp_path)
    values = json.loads((tmp_path / STATUS).read_text()) | {"host": "elsewhere", "updated": now() - 1000}
    (tmp_path / STATUS).write_text(json.dumps(values))
    assert summarize(tmp_path).state == "killed"
    beat = Heartbeat(
        rank=0, host="elsewhere", pid=1, time=now(), step=4, step_description="step 4", is_waiting=True
    )
    write_heartbeat(tmp_path, beat)
    run = summarize(tmp_path)
    assert run
    assert run.state == "running"
    assert run.age < 10
    status.end("finished")
    assert summarize(tmp_path).state == "finished"


def test_a_running_run_without_heartbeats_is_reported_as_silent(tmp_path):
    with lock_folder(tmp_path):
        begin(tmp_path)
        values = json.loads((tmp_path / STATUS).read_text()) | {"updated": now() - 1000}
        (tmp_path / STATUS).write_text(json.dumps(values))
        run = summarize(tmp_path)
    assert run
    assert run.state == "running"
    assert run.reason.startswith("no heartbeat for 100")


def test_the_first_failure_of_any_rank_is_the_reason_until_the_run_starts_again(tmp_path):
    begin(tmp_path)
    record_failure(tmp_path, 3, "the latents are damaged")
    record_failure(tmp_path, 0, "RuntimeError: connection closed by peer")
    run = summarize(tmp_path)
    assert run
    assert (run.state, run.reason) == ("failed", "the latents are damaged (rank 3)")
    with lock_folder(tmp_path):
        assert read_failure(tmp_path) == ""


def test_status_is_not_written_at_every_step_but_at_the_end(tmp_path):
    status = begin(tmp_path)
    for step in range(1, 6):
        status.step(step, 1.0, skipped=False)
    assert summarize(tmp_path).step == 0
    status.end("finished")
    assert summarize(tmp_path).step == 5


def test_runs_are_found_at_any_depth_most_recent_first_without_subfolders_of_runs(tmp_path):
    for name in ("old", "deep/er/new", "old/earlier_1"):
        begin(tmp_path / name)
        time.sleep(0.2)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / STATUS).write_text('{"task"')
    found = find_runs(tmp_path)
    assert [run.folder for run in found] == [str(tmp_path / "deep/er/new"), str(tmp_path / "old")]
    assert [run.folder for run in find_runs(tmp_path / "old")] == [str(tmp_path / "old")]


def test_a_status_of_a_newer_version_can_be_read(tmp_path):
    begin(tmp_path)
    values = json.loads((tmp_path / STATUS).read_text()) | {"of_a_newer_version": 1}
    (tmp_path / STATUS).write_text(json.dumps(values))
    assert summarize(tmp_path)


def test_a_file_system_without_locks_does_not_keep_a_run_from_starting(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    require_unlocked(tmp_path, "training")
    with lock_folder(tmp_path):
        begin(tmp_path)
        assert summarize(tmp_path).state == "running"  # by its last update
    assert "does not support locks" in caplog.text
    values = json.loads((tmp_path / STATUS).read_text()) | {"updated": now() - 1000}
    (tmp_path / STATUS).write_text(json.dumps(values))
    assert summarize(tmp_path).state == "killed"
