"""The GPU check: whatever a block does, the results of all others are kept; dry runs are not measurements."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import compare, gpu_check
from benchmarks.gpu.blocks import BLOCKS, EXPECTED, OPERATORS, RIVALS, Block
from benchmarks.gpu.body import MODULES
from benchmarks.gpu.install import install_libraries
from benchmarks.gpu.kernels import _rival
from benchmarks.gpu.operators import SIZES
from benchmarks.gpu.record import RESULTS, Recorder, gather, read_entries, require_measured
from cat_fast.errors import UserError
from cat_fast.processes.ending import still_running

ROOT = Path(__file__).parents[2]
WRITE = "from benchmarks.gpu.record import Recorder; from pathlib import Path; import sys, time; "
RECORD = "r = Recorder(Path(sys.argv[1]), sys.argv[2], False); r.figure('speed', 2.0, 'm/s'); "
BODIES = {
    "good": RECORD,
    "error": RECORD + "raise RuntimeError('no such kernel')",
    "hang": RECORD + "time.sleep(600)",
    "skip": "print('no card'); sys.exit(77)",
    "behind": "time.sleep(0.3); " + RECORD,
    "killed": RECORD + "import os; os.kill(os.getpid(), 9)",
    "parent": RECORD + "import subprocess; subprocess.Popen(['sleep', '600']); time.sleep(600)",
    "interrupts": RECORD + "import os, signal, subprocess; child = subprocess.Popen(['sleep', '600']); "
    "r.figure('block', os.getpid(), 'pid'); r.figure('child', child.pid, 'pid'); "
    "os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)",
}


class FakeCheck(gpu_check.Check):
    """A check whose blocks run a line of Python."""

    def command(self, block):
        return [sys.executable, "-c", WRITE + BODIES[block.name], str(self.out / RESULTS), block.name]


def blocks(*names, seconds=30.0, **options):
    return [Block(name=name, seconds=seconds, figures=("speed", "weight"), **options) for name in names]


def run(out, chosen, seconds=60.0):
    out.mkdir(exist_ok=True)
    code = FakeCheck(out=out, dry=False, seconds=seconds, blocks=chosen).run(chosen)
    return code, json.loads((out / "gpu_check.json").read_text())


def test_an_error_and_a_hang_leave_the_results_of_all_others(tmp_path):
    chosen = [
        *blocks("behind", background=True),
        *blocks("error", "killed", "skip"),
        *blocks("hang", "parent", seconds=2.0),
        *blocks("good", alone=True),
    ]
    code, content = run(tmp_path, chosen)
    found = content["blocks"]
    assert code == 1
    assert {name: block["state"] for name, block in found.items()} == {
        "behind": "passed", "error": "failed", "killed": "failed", "skip": "skipped", "hang": "timeout",
        "parent": "timeout", "good": "passed",
    }  # fmt: skip
    assert "no such kernel" in found["error"]["reason"]
    assert found["skip"]["reason"] == "no card"
    assert found["hang"]["reason"] == "it took longer than 2 s"
    for name, block in found.items():
        assert block["figures"].keys() == {"speed", "weight"}
        assert (block["figures"]["speed"]["value"] == 2.0) == (name != "skip")
        assert block["figures"]["weight"]["value"] is None
        assert block["figures"]["weight"]["reason"]
    files = list(tmp_path.iterdir())
    assert len(files) <= 5
    assert all(path.is_file() and path.stat().st_size < gpu_check.MAX_FILE_BYTES for path in files)
    with zipfile.ZipFile(tmp_path / "logs.zip") as archive:
        assert sorted(archive.namelist()) == sorted(f"{name}.log" for name in found)
        assert b"no such kernel" in archive.read("error.log")


def test_blocks_past_the_limit_are_named_and_can_be_run_again(tmp_path, capsys):
    chosen = blocks("hang", "good")
    code, content = run(tmp_path, chosen, seconds=gpu_check._FINISH_SECONDS + 6.0)
    assert code == 1
    assert content["blocks"]["good"]["state"] == "not reached"
    assert "--only hang,good" in capsys.readouterr().out
    FakeCheck(out=tmp_path, dry=False, seconds=60.0, blocks=chosen).run(chosen[1:])
    blocks_now = json.loads((tmp_path / "gpu_check.json").read_text())["blocks"]
    assert (blocks_now["hang"]["state"], blocks_now["good"]["state"]) == ("timeout", "passed")


@pytest.mark.parametrize("background", [False, True])
def test_no_block_outlives_an_interrupted_check(tmp_path, monkeypatch, background):
    chosen = blocks("interrupts", background=background)
    monkeypatch.setattr(gpu_check, "BLOCKS", chosen)
    monkeypatch.setattr(gpu_check, "Check", partial(FakeCheck, blocks=chosen))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            gpu_check.main(["--out", str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, before)
    found = json.loads((tmp_path / "gpu_check.json").read_text())["blocks"]["interrupts"]
    assert (found["state"], found["reason"]) == ("failed", "the check was interrupted")
    processes = [found["figures"][name]["value"] for name in ("block", "child")]
    for _ in range(500):  # a killed process takes a moment to end
        if not still_running(processes):
            break
        time.sleep(0.01)
    assert still_running(processes) == []


def test_a_cut_line_of_results_is_left_out(tmp_path):
    recorder = Recorder(tmp_path / RESULTS, "good", True)
    recorder.figure("speed", 1.0, "m/s")
    recorder.figure("speed", 3.0, "m/s")
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"block": "good", "ki')
    entries = read_entries(tmp_path / RESULTS)
    assert len(entries) == 2
    assert gather(entries, {"good": ["speed"]})["good"]["figures"]["speed"]["value"] == 3.0


def test_dry_figures_are_no_measurements(tmp_path, capsys):
    with pytest.raises(ValueError, match="a dry run are not measurements"):
        require_measured({"dry": True}, "a.json")
    assert require_measured({"dry": False}, "a.json") == {"dry": False}
    dry = tmp_path / "gpu_check.json"
    dry.write_text(json.dumps({"dry": True}))
    with pytest.raises(UserError, match="figures of a dry run are not measurements"):
        compare.load(dry)
    Recorder(tmp_path / RESULTS, "good", True).figure("speed", 1.0, "m/s")
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path)])
    assert "holds results of a dry run" in capsys.readouterr().err


def test_two_checks_are_compared():
    def content(milliseconds):
        figures = {
            "adaln.forward.milliseconds": {"value": milliseconds, "low": milliseconds, "high": milliseconds}
        }
        return {"cases": gpu_check.timed_cases({"kernels": {"figures": figures}})}

    (change,) = compare.compare("gpu_check", content(1.0), content(2.0)).changes
    assert (change.case, change.before) == ("kernels.adaln.forward seconds ours", 1e-3)
    assert change.verdict == compare.WORSE


def test_committed_checks_are_measurements_with_every_key():
    for path in (ROOT / "benchmarks/results").glob("gpu_check_*.json"):
        content = require_measured(json.loads(path.read_text()), path.name)
        assert content["blocks"].keys() == EXPECTED.keys()


def latest_end(blocks):
    """Return the end of the last block where all take until their limits."""
    now = background = 0.0
    for block in blocks:
        if block.alone:
            now = max(now, background)
        if block.background:
            background = max(background, now + block.seconds)
        else:
            now += block.seconds
    return max(now, background)


def test_every_block_has_a_body_and_the_limits_fit():
    assert MODULES.keys() == EXPECTED.keys()
    assert latest_end(BLOCKS) + gpu_check._FINISH_SECONDS <= 480
    assert sum(block.dry_seconds for block in BLOCKS if not block.background) >= 300


@pytest.mark.parametrize("op", [op for op in OPERATORS if "compile" in RIVALS[op]])
def test_what_is_compiled_computes_the_operator(op, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    call = SIZES["toy"][op](torch.device("cpu"), torch.float64)
    rival = replace(call, function=_rival(op, "compile", call))
    for ours, theirs in zip(call.forward_backward(), rival.forward_backward(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_norms_have_a_compiled_rival():
    assert all("compile" in RIVALS[op] for op in ("group_norm_silu", "adaln", "gate_residual_adaln"))


def test_unknown_blocks_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        gpu_check.main(["--out", str(tmp_path), "--only", "kernel"])
    assert refused.value.code == 2
    assert "unknown block kernel: expected some of install, ceilings" in capsys.readouterr().err


LIBRARIES = ("_ops.abi3.so", "_ops_cuda.abi3.so")


def collect(folder, path):
    """Run the script that gathers wheels and libraries, without wheels, with the programs of a folder."""
    python = path / "no_wheels"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    return subprocess.run(
        ["bash", str(ROOT / "scripts/collect_gpu_wheels.sh"), str(folder)],
        env={**os.environ, "PYTHON": str(python), "PATH": str(path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def programs(tmp_path):
    """Folder of the programs that the script runs, without `strip`."""
    if not all((ROOT / "cat_fast" / name).exists() for name in LIBRARIES):
        pytest.skip("the libraries are not built")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("awk", "bash", "cp", "dirname", "find", "git", "gzip", "mkdir", "stat", "xargs"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


@pytest.mark.parametrize("with_strip", [False, True])
def test_gathered_libraries_are_stripped_and_compressed(programs, tmp_path, with_strip):
    if with_strip:
        if not (strip := shutil.which("strip")):
            pytest.skip("strip is not installed")
        (programs / "strip").symlink_to(strip)
    gathered, package = tmp_path / "wheels", tmp_path / "package"
    package.mkdir()
    ran = collect(gathered, programs)
    assert ran.returncode == 0, ran.stderr
    install_libraries(gathered, package)
    for name in LIBRARIES:
        built, installed = ROOT / "cat_fast" / name, package / name
        assert installed.stat().st_size < built.stat().st_size or not with_strip
        assert (installed.read_bytes() == built.read_bytes()) != with_strip
        assert (gathered / f"{name}.gz").stat().st_size < installed.stat().st_size / 2
    code = "import sys, torch; [torch.ops.load_library(path) for path in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", code, *(str(package / name) for name in LIBRARIES)], check=True)


def test_what_does_not_fit_on_the_machine_is_refused(programs, tmp_path):
    gathered = tmp_path / "wheels"
    gathered.mkdir()
    with (gathered / "large.whl").open("wb") as file:
        file.truncate(62 << 20)
    ran = collect(gathered, programs)
    assert ran.returncode == 1
    assert "more than 62 MiB" in ran.stderr
