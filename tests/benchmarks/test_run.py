"""The suite runs each benchmark in a process, keeps what finished, and resumes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import run
from benchmarks.shared.committed import arguments_of, read
from cat_fast.processes.signals import Interrupted

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": {"processor": "Test", "threads": 1}, "gpus": [], "commit": "abc1234"}


@pytest.fixture
def ran(monkeypatch):
    """Replaces the processes: a benchmark writes its file and exits with its code in `codes`, else with 0.

    Those in the set `broken` write nothing, or only some cases if they resume.
    """
    found = SimpleNamespace(commands=[], codes={}, broken=set())

    def execute(command, log):
        found.commands.append(command)
        name = command[2].removeprefix("benchmarks.")
        log.write_text("log\n")
        missing = {"missing": ["b"]} if name in found.broken else {}
        if name not in found.broken or name in ("kernels", "packing", "scaling_validation"):
            Path(command[4]).write_text(json.dumps({"about": {**MACHINE, **missing}}))
        return found.codes.get(name, 1 if name in found.broken else 0)

    monkeypatch.setattr(run, "_execute", execute)
    monkeypatch.setattr(run.machine, "describe", lambda: MACHINE)
    return found


def names(found):
    return [command[2].removeprefix("benchmarks.") for command in found.commands]


def states(folder):
    return {job["name"]: job["state"] for job in run.recorded(folder)}


def test_every_job_of_every_suite_is_a_benchmark():
    for jobs in run.SUITES.values():
        for job in jobs:
            script = (ROOT / f"benchmarks/{job.name}.py").read_text()
            of_program = re.search(r"(?<!simple_)program\.main\(", script) is not None
            assert (job.resumes_with == run.KEEP) == of_program, job.name
        assert [job.name for job in jobs if job.reads_results] == [jobs[-1].name] == ["claims"]


def test_a_failure_stops_no_other_benchmark_and_a_second_run_resumes(tmp_path, ran, capsys):
    ran.broken = {"packing", "straggler"}
    command = ["--suite", "quick", "--out", str(tmp_path)]
    assert run.main(command) == 1
    found = states(tmp_path)
    assert found.pop("packing") == found.pop("straggler") == run.FAILED
    assert set(found.values()) == {run.FINISHED}
    assert "packing: failed, exit code 1" in capsys.readouterr().out
    ran.broken, ran.commands[:] = set(), []
    assert run.main(command) == 0
    assert names(ran) == ["packing", "straggler", "claims"], "claims read the new results"
    assert [ran.commands[0][-2:], ran.commands[1][-1:]] == [["--quick", "--keep"], ["--quick"]]
    assert not list(tmp_path.glob("*.part"))
    printed = capsys.readouterr().out
    assert "packing: about 1 minutes, 0:04:00 left in the suite" in printed
    assert '"kept": 4' in printed
    assert [path.name[:15] for path in tmp_path.glob("claims*.json")] == ["claims_counted_"]
    assert ran.commands[-1][-2:] == ["--results", str(tmp_path)]
    commands = {job["name"]: job["command"] for job in run.recorded(tmp_path)}
    assert commands["kernels"].startswith("python -m benchmarks.kernels --json kernels_test-1t_")
    assert commands["claims"].endswith(".json --results .")
    assert run.main(command) == 0
    assert len(ran.commands) == 3


def test_what_an_interrupted_benchmark_measured_at_another_commit_is_not_resumed(tmp_path, ran, monkeypatch):
    ran.broken = {"kernels"}
    assert run.main(["--only", "kernels", "--out", str(tmp_path)]) == 1
    monkeypatch.setattr(run.machine, "describe", lambda: MACHINE | {"commit": "def5678"})
    assert run.main(["--only", "kernels", "--out", str(tmp_path)]) == 1
    assert not any("--keep" in command for command in ran.commands)


def test_results_of_uncommitted_changes_are_not_resumed(tmp_path, ran, monkeypatch, capsys):
    monkeypatch.setitem(MACHINE, "commit", "abc1234+")
    ran.broken = {"kernels"}
    command = ["--only", "kernels", "--out", str(tmp_path)]
    assert run.main(command) == run.main(command) == 1
    assert not any("--keep" in command for command in ran.commands)
    assert "discarded: measured with uncommitted changes of abc1234+" in capsys.readouterr().out
    ran.broken = set()
    assert run.main(command) == run.main(command) == 0
    kept = "measured with uncommitted changes of abc1234+, which may not be the present ones; delete it"
    assert kept in capsys.readouterr().out


def test_an_unfinished_validation_is_resumed_by_the_same_command(tmp_path, ran):
    ran.broken = {"scaling_validation"}
    command = ["--only", "scaling_validation", "--out", str(tmp_path)]
    assert run.main(command) == 1
    assert states(tmp_path) == {"scaling_validation": run.FAILED}
    assert Path(ran.commands[0][4]).exists()
    ran.broken = set()
    assert run.main(command) == 0
    assert ran.commands[0] == ran.commands[1]


def test_results_with_misses_are_kept(tmp_path, ran, capsys):
    ran.codes = {"scaling_validation": 1, "startup": 2}
    command = ["--only", "scaling_validation,startup", "--out", str(tmp_path)]
    assert run.main(command) == 1
    assert states(tmp_path) == {"scaling_validation": run.MISSES, "startup": run.FAILED}
    assert len(list(tmp_path.glob("scaling_validation_test-1t_*.json"))) == 1
    ran.codes = {}
    assert run.main(command) == 1
    (tmp_path / run.RECORD).unlink()
    assert run.main(command) == 1
    assert names(ran)[2:] == ["startup"]
    assert states(tmp_path) == {"scaling_validation": run.MISSES, "startup": run.FINISHED}


def test_rough_results_are_not_taken_for_complete_ones(tmp_path, ran, capsys, monkeypatch):
    out = ["--out", str(tmp_path)]
    run.main(["--suite", "quick", "--only", "kernels", *out])
    run.main(["--suite", "cpu", "--only", "kernels", *out])
    assert [command[5:] for command in ran.commands] == [["--quick"], []]
    monkeypatch.setattr(run.machine, "describe", lambda: MACHINE | {"commit": "def5678"})
    capsys.readouterr()
    for suite in ("quick", "cpu"):
        run.main(["--suite", suite, "--only", "kernels", *out])
    assert len(ran.commands) == 2
    printed = capsys.readouterr().out
    assert printed.count(".json, measured with another commit; delete it to measure again") == 2


def test_counted_results_are_kept_at_their_commit_only(tmp_path, ran, monkeypatch):
    def execute(command, log):
        ran.commands.append(command)
        Path(command[4]).write_text('{"about": {"benchmark": "roofline"}}')
        return 0

    monkeypatch.setattr(run, "_execute", execute)
    command = ["--only", "roofline", "--out", str(tmp_path)]
    for commit, runs in (("abc1234", 1), ("abc1234", 1), ("def5678", 2), ("def5678+", 3), ("def5678+", 4)):
        monkeypatch.setitem(MACHINE, "commit", commit)
        assert run.main(command) == 0
        assert len(ran.commands) == runs, commit
        (path,) = tmp_path.glob("roofline_counted_*.json")
        assert read(path)["about"]["commit"] == commit


@pytest.mark.parametrize(
    ("suite", "about", "runs"),
    [
        ("cpu", {"missing": ["b"]}, 1),
        ("cpu", {"effort": {"min_pairs": 1}}, 1),
        ("cpu", {"quick": True}, 1),
        ("quick", {"quick": True}, 0),
        ("cpu", {}, 0),
    ],
)
def test_results_of_a_call_by_hand_are_kept_if_they_are_complete(tmp_path, ran, suite, about, runs):
    (tmp_path / "kernels_test-1t_2026-01-01.json").write_text(json.dumps({"about": MACHINE | about}))
    assert run.main(["--suite", suite, "--only", "kernels", "--out", str(tmp_path)]) == 0
    assert len(ran.commands) == runs


def backdate(path):
    """Renames a result to that of a year earlier."""
    name, date = path.stem.rsplit("_", 1)
    return path.rename(path.with_name(f"{name}_{int(date[:4]) - 1}{date[4:]}.json"))


def test_the_arguments_of_a_result_are_in_its_file(tmp_path, ran, monkeypatch):
    out = ["--only", "kernels,startup", "--out", str(tmp_path)]
    run.main(["--suite", "quick", *out])
    (rough,) = tmp_path.glob("kernels_*.json")
    rough = backdate(rough)
    execute = run._execute

    def interrupt(command, log):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(run, "_execute", interrupt)
    with pytest.raises(Interrupted):
        run.main(["--suite", "cpu", *out])
    monkeypatch.setattr(run, "_execute", execute)
    ran.commands.clear()
    run.main(["--suite", "cpu", *out])
    assert [command[5:] for command in ran.commands] == [[]], "the rough result is not kept"
    full = max(tmp_path.glob("kernels_*.json"))
    full.unlink()
    run.main(["--suite", "cpu", *out])
    assert len(ran.commands) == 2, "nor once the complete one is deleted"
    (tmp_path / run.RECORD).unlink()
    rough.unlink()
    run.main(["--suite", "quick", *out])
    assert len(ran.commands) == 2
    assert {job["name"]: job["arguments"] for job in run.recorded(tmp_path)}["kernels"] == []
    run.main(["--suite", "cpu", *out])
    assert len(ran.commands) == 2, "a quick suite does not turn complete results into rough ones"


def test_claims_are_kept_only_if_they_are_newer_than_all_other_results(tmp_path, ran):
    out = ["--out", str(tmp_path)]
    only = ["--only", "kernels,claims", *out]
    assert run.main(only) == 0
    assert run.main(only) == 0
    assert names(ran) == ["kernels", "claims"]
    (kernels,) = tmp_path.glob("kernels_*.json")
    kernels.unlink()
    assert run.main(["--only", "kernels", *out]) == 0
    os.utime(kernels, ns=(0, kernels.stat().st_mtime_ns + 10**9))
    ran.commands.clear()
    ran.broken = {"claims"}
    assert run.main(only) == 1
    assert run.main(only) == 1
    assert names(ran) == ["claims", "claims"], "the claims of older results do not replace failed ones"


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
    assert {name: (job["state"], job.get("kept", False), job["seconds"]) for name, job in jobs.items()} == {
        "packing": (run.FINISHED, True, 90),
        "startup": (run.FINISHED, False, 90),
        "loader": (run.FINISHED, False, 90),
    }
    capsys.readouterr()
    assert run.main(["--plan", *out]) == 0
    rows = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines()}
    assert rows["packing"] == rows["startup"] == rows["loader"] == ["1.5", "measured"]
    assert rows["serving"] == ["120.0", "estimate"]
    done = sum(job.minutes for job in run.SUITES["cpu"] if job.name in jobs)
    assert rows["left"] == [f"{total - done:.1f}"]
    for text in ("[]", '{"jobs": [1]}'):
        (tmp_path / "new" / run.RECORD).write_text(text)
        assert run.main(["--plan", *out]) == 2
        assert "run.json: " in capsys.readouterr().err


def test_timed_benchmarks_run_again_for_the_noise(tmp_path, ran):
    assert run.main(["--only", "gpu_static,kernels", "--out", str(tmp_path), "--again", "2"]) == 0
    assert names(ran) == ["gpu_static", "kernels", "kernels", "kernels"]
    assert len(list(tmp_path.glob("again_*/kernels_*.json"))) == 2


def test_single_benchmarks_are_chosen_by_name(tmp_path, ran, capsys):
    assert run.main(["--only", "serving,kernels", "--out", str(tmp_path)]) == 0
    assert names(ran) == ["serving", "kernels"]
    assert run.main(["--only", "speed", "--out", str(tmp_path)]) == 2
    assert "--only speed: expected some of autoencoder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run.main(["--only", "kernels", "--out", str(tmp_path / "file")]) == 2


def test_an_interruption_is_recorded_with_what_has_not_run(tmp_path, ran, monkeypatch):
    def interrupt(command, log):
        execute(command, log)
        raise Interrupted(signal.SIGTERM)

    execute, clock = run._execute, iter(range(0, 10_000, 90))
    ran.broken = {"kernels"}
    monkeypatch.setattr(run, "_execute", interrupt)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    command = ["--only", "kernels,startup", "--out", str(tmp_path)]
    for seconds in (90, 180):
        with pytest.raises(Interrupted) as caught:
            run.main(command)
        assert states(tmp_path) == {"kernels": run.INTERRUPTED, "startup": run.MISSING}
        assert run.recorded(tmp_path)[0]["seconds"] == seconds
    assert "kernels was ended; finished results are in" in caught.value.__notes__[0]
    ran.broken = set()
    monkeypatch.setattr(run, "_execute", execute)
    assert run.main(command) == 0
    assert [job["seconds"] for job in run.recorded(tmp_path)] == [270, 90]


def test_a_signal_lets_the_benchmark_end_by_itself(tmp_path):
    """Its temporary files are removed, and no process remains."""
    benchmark = """
import pathlib, sys, time
from cat_fast.processes.signals import run_command

def main():
    pathlib.Path(sys.argv[1]).touch()
    try:
        time.sleep(60)
    finally:
        pathlib.Path(sys.argv[1]).unlink()

sys.exit(run_command(main))
"""
    program = f"""
import sys
from pathlib import Path
from benchmarks.run import _execute
from cat_fast.processes.signals import run_command

command = [sys.executable, "-c", {benchmark!r}, {str(tmp_path / "temporary")!r}]
sys.exit(run_command(lambda: _execute(command, Path({str(tmp_path / "log")!r}))))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    for _ in range(600):
        if (tmp_path / "temporary").exists():
            break
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert not (tmp_path / "temporary").exists()


@pytest.mark.slow
def test_claims_read_the_results_of_a_quick_suite(tmp_path):
    command = ["--suite", "quick", "--only", "packing,claims", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "benchmarks.run", *command], cwd=ROOT, check=False)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, logs
    assert states(tmp_path) == {"packing": run.FINISHED, "claims": run.FINISHED}
    arguments = {path.name.split("_")[0]: arguments_of(read(path)) for path in tmp_path.glob("*_*.json")}
    assert arguments == {"packing": ("--quick",), "claims": ()}
    assert not list(tmp_path.glob("*.part"))
