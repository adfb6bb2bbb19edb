"""`cat-fast runs` tells of each run what it is, how it stands and how to go on."""

from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.health.run_status import RunStatus, StatusFile
from cat_fast.training.runtime.ranks import Ranks
from tests.cli.conftest import assert_one_line_error, parse_json


def begin(folder, command="deepspeed --module cat_fast.train a.yaml") -> StatusFile:
    folder.mkdir(parents=True)
    return StatusFile(folder, RunStatus(task="tokenizer", total_steps=100, command=command))


def test_each_state_is_told_with_the_reason_and_the_way_on(cat_fast, tmp_path):
    finished, preempted, killed = (begin(tmp_path / name) for name in ("a", "b", "c"))
    finished.step(100, 0.25, skipped=False)
    finished.end("finished")
    preempted.step(40, 0.5, skipped=True)
    store = CheckpointStore(tmp_path / "b" / "checkpoints", Ranks())
    store.save(40, lambda folder: None)
    store.wait()
    preempted.end("preempted", "SIGTERM")
    told = cat_fast("runs", tmp_path).stdout
    for word in ("finished", "preempted", "killed"):
        assert word in told
    assert f"{tmp_path / 'b'} is preempted: SIGTERM" in told
    assert told.count("&& deepspeed --module cat_fast.train a.yaml") == 2  # b and c

    runs = {run["folder"]: run for run in parse_json(cat_fast("runs", tmp_path, "--json"))}
    assert runs[str(tmp_path / "a")]["resume"] == ""
    run = runs[str(tmp_path / "b")]
    assert (run["state"], run["step"], run["total_steps"]) == ("preempted", 40, 100)
    assert (run["loss"], run["skipped"]) == (0.5, 1)
    assert run["checkpoint"] == str(tmp_path / "b" / "checkpoints" / "step_00000040")
    assert run["resume"].endswith("&& deepspeed --module cat_fast.train a.yaml")
    assert killed.status.state == "running"
    assert runs[str(tmp_path / "c")]["state"] == "killed"


def test_a_folder_without_runs_says_so_and_one_that_is_missing_is_an_error(cat_fast, tmp_path):
    assert cat_fast("runs", tmp_path).stdout == f"no runs in {tmp_path}\n"
    assert parse_json(cat_fast("runs", tmp_path, "--json")) == []
    assert_one_line_error(cat_fast("runs", tmp_path / "no"), "no such folder")
