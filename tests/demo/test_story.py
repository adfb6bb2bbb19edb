"""`cat-fast demo --quick` end to end: interrupted, resumed, and its output checked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cat_fast import CATPipeline, NestedAutoencoderKL
from cat_fast.training.metrics.run_log import read_metrics
from tests.processes.survivors import processes_naming

# Children of a background process of a shell ignore SIGINT, and those of nohup SIGHUP: restore the defaults.
ENABLE_SIGNALS = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " signal.signal(signal.SIGHUP, signal.SIG_DFL)"
)
MAIN = f"{ENABLE_SIGNALS}; from cat_fast.cli.main import main; main()"
STEPS = {"tokenizer": 8, "generator": 4}
COMMAND = [
    *(sys.executable, "-c", MAIN, "demo", "--quick"),
    *("--tokenizer-steps", str(STEPS["tokenizer"]), "--generator-steps", str(STEPS["generator"]), "--out"),
]


def start(out: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Interrupt the demo with Ctrl-C while the tokenizer trains, then run the same command to completion."""
    out = tmp_path_factory.mktemp("demo") / "out"
    first = start(out)
    deadline = time.monotonic() + 200
    while len(read_metrics(out / "runs" / "tokenizer")) < 5:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    interrupted = (*first.communicate(timeout=60), first.returncode)
    remaining = processes_naming(out)
    second = start(out)
    output, errors = second.communicate(timeout=400)
    assert second.returncode == 0, errors
    return out, interrupted, remaining, output


def test_ctrl_c_ends_all_processes_with_one_line(finished):
    _, (_, errors, code), remaining, _ = finished
    assert code == 130
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("interrupted (SIGINT): the checkpoint after step ")
    assert last.endswith("of 8 is saved; run the same command again to resume")
    assert remaining == []


def test_rerun_resumes_from_a_checkpoint(finished):
    out, *_ = finished
    assert "resumed from" in (out / "logs" / "tokenizer.log").read_text()
    for kind, steps in STEPS.items():
        assert [r["step"] for r in read_metrics(out / "runs" / kind)] == list(range(steps))


def test_summary_is_five_lines_with_existing_paths(finished):
    out, _, _, output = finished
    lines = output.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["report", "tokenizer", "generator", "tokens", "next"]
    for name in ("report.html", "metrics.json", "pipeline/vae"):
        assert str(out / name) in output
        assert (out / name).exists()


def test_models_load_and_metrics_are_complete(finished):
    out, *_ = finished
    tokenizer = NestedAutoencoderKL.from_pretrained(out / "pipeline" / "vae")
    pipeline = CATPipeline.from_pretrained(out / "pipeline")
    assert pipeline.vae.fingerprint() == tokenizer.fingerprint()
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["images"]) == metrics["held_out"]["images"] == 8
    assert set(metrics["held_out"]["per_ratio"]) == {"8", "16", "32"}
    assert {s["tokens"] for s in metrics["samples"]} == {64, 16, 4}
    complexity = metrics["complexity"]
    assert complexity["thresholds"] == [4, 7]
    tokens = {"8": 1024, "16": 256, "32": 64}
    for part in (complexity["captions"], complexity["photographs"]):
        assert part["mean_tokens"] == pytest.approx(sum(part["mix"][f] * tokens[f] for f in tokens))


def test_folder_is_not_resumed_with_other_settings(finished):
    out, *_ = finished
    other = subprocess.run(
        [*("--train" if a == "--quick" else a for a in COMMAND), str(out)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert other.returncode == 2
    assert other.stderr.startswith("error: ")
    assert "other settings" in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1
