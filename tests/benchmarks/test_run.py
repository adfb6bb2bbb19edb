"""The suite runs each benchmark in a process, keeps what finished, and resumes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import run

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": {"processor": "Test", "threads": 1}, "gpus": []}


@pytest.fixture
def ran(monkeypatch):
    """Replaces the processes: a benchmark writes its file unless it is in the set `broken`."""
    found = SimpleNamespace(commands=[], broken=set())

    def start(command, stdout, **options):
        found.commands.append(command)
        name = command[2].removeprefix("benchmarks.")
        stdout.write("log\n")
        if name not in found.broken:
            Path(command[4]).write_text("{}")
        return SimpleNamespace(returncode=int(name in found.broken))

    monkeypatch.setattr(run.subprocess, "run", start)
    monkeypatch.setattr(run.machine, "describe", lambda: MACHINE)
    return found


def test_every_job_of_every_suite_is_a_benchmark():
    for jobs in run.SUITES.values():
        for job in jobs:
            assert (ROOT / f"benchmarks/{job.name}.py").exists(), job.name


def test_a_failure_stops_no_other_benchmark_and_a_second_run_resumes(tmp_path, ran, capsys):
    ran.broken = {"packing"}
    command = ["--suite", "quick", "--out", str(tmp_path)]
    assert run.main(command) == 1
    written = json.loads((tmp_path / "run.json").read_text())
    states = {job["name"]: job["state"] for job in written["jobs"]}
    assert states.pop("packing") == run.FAILED
    assert set(states.values()) == {run.FINISHED}
    assert not list(tmp_path.glob("*.part"))
    assert "failed with exit code 1" in capsys.readouterr().out
    ran.broken, ran.commands[:] = set(), []
    assert run.main(command) == 0
    assert [command[2] for command in ran.commands] == ["benchmarks.packing"]
    assert "--quick" in ran.commands[0]
    assert [path.name[:15] for path in tmp_path.glob("claims*.json")] == ["claims_counted_"]
    assert written["jobs"][0]["command"].startswith("python -m benchmarks.kernels --json kernels_test-1t_")


def test_a_suite_runs_in_parts_by_its_plan(tmp_path, ran, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 90))
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    out = ["--out", str(tmp_path / "new")]
    assert run.main(["--plan", *out]) == 0
    assert not (tmp_path / "new").exists()
    total = sum(job.minutes for job in run.SUITES["cpu"])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["left", f"{total:.1f}"]
    assert run.main(["--only", "packing,startup", *out]) == 0
    assert run.main(["--only", "packing,loader", *out]) == 0
    jobs = {job["name"]: job for job in run.recorded(tmp_path / "new")}
    assert {name: (job["state"], job["seconds"]) for name, job in jobs.items()} == {
        "packing": (run.SKIPPED, 90),
        "startup": (run.FINISHED, 90),
        "loader": (run.FINISHED, 90),
    }
    capsys.readouterr()
    assert run.main(["--plan", *out]) == 0
    rows = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines()}
    assert rows["packing"] == rows["startup"] == rows["loader"] == ["1.5", "measured"]
    assert rows["serving"] == ["120.0", "estimate"]
    done = sum(job.minutes for job in run.SUITES["cpu"] if job.name in jobs)
    assert rows["left"] == [f"{total - done:.1f}"]
    (tmp_path / "new" / run.RECORD).write_text("[]")
    assert run.main(["--plan", *out]) == 2
    assert "run.json: not a record of benchmarks" in capsys.readouterr().err


def test_timed_benchmarks_run_again_for_the_noise(tmp_path, ran):
    assert run.main(["--only", "claims,kernels", "--out", str(tmp_path), "--again", "2"]) == 0
    names = [command[2].removeprefix("benchmarks.") for command in ran.commands]
    assert names == ["claims", "kernels", "kernels", "kernels"]
    assert len(list(tmp_path.glob("again_*/kernels_*.json"))) == 2


def test_single_benchmarks_are_chosen_by_name(tmp_path, ran, capsys):
    assert run.main(["--only", "serving,kernels", "--out", str(tmp_path)]) == 0
    assert [command[2] for command in ran.commands] == ["benchmarks.serving", "benchmarks.kernels"]
    assert run.main(["--only", "speed", "--out", str(tmp_path)]) == 2
    assert "--only speed: expected some of autoencoder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run.main(["--only", "kernels", "--out", str(tmp_path / "file")]) == 2
