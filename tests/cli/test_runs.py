"""`cat-fast runs` lists each run's task, state and resume command."""

from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.health.run_status import RunStatus, StatusFile
from cat_fast.training.runtime.ranks import Ranks
from tests.cli.conftest import assert_one_line_error, parse_json


def start(folder, command="deepspeed --module cat_fast.train a.yaml") -> StatusFile:
    folder.mkdir(parents=True)
    return StatusFile(folder, RunStatus(task="tokenizer", total_steps=100, command=command))


def test_each_state_is_listed_with_reason_and_resume_command(cat_fast, tmp_path):
    finished, preempted, killed = (start(tmp_path / name) for name in ("a", "b", "c"))
    finished.step(100, 0.25, skipped=False)
    finished.end("finished")
    preempted.step(40, 0.5, skipped=True)
    store = CheckpointStore(tmp_path / "b" / "checkpoints", Ranks())
    store.save(40, lambda folder: None)
    store.wait()
    preempted.end("preempted", "SIGTERM")
    output = cat_fast("runs", tmp_path).stdout
    for word in ("finished", "preempted", "killed"):
        assert word in output
    assert f"{tmp_path / 'b'} is preempted: SIGTERM" in output
    assert output.count("&& deepspeed --module cat_fast.train a.yaml") == 2  # b and c

    runs = {run["folder"]: run for run in parse_json(cat_fast("runs", tmp_path, "--json"))}
    assert runs[str(tmp_path / "a")]["resume"] == ""
    run = runs[str(tmp_path / "b")]
    assert (run["state"], run["step"], run["total_steps"]) == ("preempted", 40, 100)
    assert (run["loss"], run["skipped"]) == (0.5, 1)
    assert run["checkpoint"] == str(tmp_path / "b" / "checkpoints" / "step_00000040")
    assert run["resume"].endswith("&& deepspeed --module cat_fast.train a.yaml")
    assert killed.status.state == "running"
    assert runs[str(tmp_path / "c")]["state"] == "killed"


def test_folder_without_runs_and_missing_folder(cat_fast, tmp_path):
    assert cat_fast("runs", tmp_path).stdout == f"no runs in {tmp_path}\n"
    assert parse_json(cat_fast("runs", tmp_path, "--json")) == []
    assert_one_line_error(cat_fast("runs", tmp_path / "no"), "no such folder")
