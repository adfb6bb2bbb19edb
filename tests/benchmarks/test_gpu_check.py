"""The GPU check: whatever a block does, the results of all others are kept; dry runs are not measurements."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import compare, gpu_check
from benchmarks.gpu.blocks import BLOCKS, EXPECTED, Block
from benchmarks.gpu.body import MODULES
from benchmarks.gpu.record import RESULTS, Recorder, gather, read_entries, require_measured
from cat_fast.errors import UserError

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

    (change,) = compare.compare(content(1.0), content(2.0))
    assert (change.case, change.before, change.verdict) == ("kernels.adaln.forward", 1e-3, compare.SLOWER)


def test_committed_checks_are_measurements_with_every_key():
    for path in (ROOT / "benchmarks/results").glob("gpu_check_*.json"):
        content = require_measured(json.loads(path.read_text()), path.name)
        assert content["blocks"].keys() == EXPECTED.keys()


def test_every_block_has_a_body_and_the_limits_fit():
    assert MODULES.keys() == EXPECTED.keys()
    assert sum(block.seconds for block in BLOCKS if not block.background) + 8 <= 480
    assert sum(block.dry_seconds for block in BLOCKS if not block.background) >= 300


def test_unknown_blocks_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        gpu_check.main(["--out", str(tmp_path), "--only", "kernel"])
    assert refused.value.code == 2
    assert "unknown block kernel: expected some of install, ceilings" in capsys.readouterr().err
