"""Exact resume: a run killed with its launcher and restarted equals an uninterrupted run."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from benchmarks.shared.random_latents import write_latents
from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.metrics.run_log import METRICS, read_metrics
from cat_fast.training.runtime.ranks import Ranks
from tests.training.rank_processes import run_ranks
from tests.training.runs import command, settings, start

TRAIN = "tests.training.runs:train_as_rank"
STEPS = 12
KILL_AFTER = 6
SCHEDULE = (f"schedule.total_steps={STEPS}", "checkpoint.every_steps=4")


def kill_in_mid_step(process: subprocess.Popen, run: Path, log: Path) -> None:
    """Send SIGKILL to the launcher and all ranks, after a step past a checkpoint has been logged."""
    deadline = time.monotonic() + 500
    while len(read_metrics(run)) < KILL_AFTER:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_checkpoint(run: Path) -> list[torch.Tensor]:
    """Return every tensor that the engines of both ranks saved at the end: weights, moments, counts."""
    files = sorted((run / "checkpoints" / f"step_{STEPS:08d}").rglob("*.pt"))
    assert len(files) >= 3
    states = [torch.load(file, map_location="cpu", weights_only=False) for file in files]
    return [leaf for leaf in tree_leaves(states) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_a_killed_and_restarted_run_equals_an_uninterrupted_one(kind, tmp_path):
    latents = write_latents(tmp_path / "latents")
    killed, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    log = tmp_path / "log"

    kill_in_mid_step(start(command(kind, killed, latents, *SCHEDULE), log), killed, log)
    assert not (killed / "model").exists()
    left = CheckpointStore(killed / "checkpoints", Ranks()).latest()
    assert left is not None
    assert 0 < left[0] < STEPS
    # A partial checkpoint, as after a kill while it is written, must not be loaded.
    half = killed / "checkpoints" / f"step_{STEPS - 1:08d}"
    half.mkdir()
    (half / "ema.safetensors").write_bytes(b"half")

    resumed, _ = run_ranks(TRAIN, 2, *settings(kind, killed, latents, *SCHEDULE))
    assert f"at step {left[0]} of {STEPS}" in resumed
    assert "manifest is missing or invalid" in resumed
    run_ranks(TRAIN, 2, *settings(kind, uninterrupted, latents, *SCHEDULE))

    assert [r["step"] for r in read_metrics(killed)] == list(range(STEPS))
    name = "model/diffusion_pytorch_model.safetensors"
    resumed_weights, expected_weights = load_file(killed / name), load_file(uninterrupted / name)
    assert resumed_weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        assert torch.equal(resumed_weights[key], value), key
    for resumed, expected in zip(*map(last_checkpoint, (killed, uninterrupted)), strict=True):
        assert torch.equal(resumed, expected)
    losses = [[r["loss"] for r in read_metrics(run)] for run in (killed, uninterrupted)]
    assert losses[0] == losses[1]
    files = [path for path in uninterrupted.rglob("*") if path.is_file()]
    assert any(path.name == "ema.safetensors" for path in files)
    mode = stat.S_IMODE((uninterrupted / METRICS).stat().st_mode)
    # The engine's checkpoints contain scripts, which are executable.
    assert [path.name for path in files if path.stat().st_mode & 0o666 != mode] == []
    if kind == "tokenizer":
        records = read_metrics(uninterrupted)
        assert "discriminator" not in records[5]
        assert {"l1", "kl", "st_lpips_alex", "gan", "weighted/gan", "discriminator"} <= records[6].keys()
        assert [step for step, record in enumerate(records) if "r1" in record] == [10]
        assert all(record["lecam"] > 0 for record in records[7:])
        for record in records:
            ratios = {name.removeprefix("loss_") for name in record if name.startswith("loss_")}
            terms = {n for n in record if f"weighted/{n}" in record and not n.endswith(tuple(ratios))}
            assert {"l1", "kl", "st_lpips_alex"} <= terms
            for name in terms:
                assert {
                    f"{kind}{name}_{ratio}" for kind in ("", "weighted/") for ratio in ratios
                } <= record.keys()
        assert {"gan", "discriminator", "r1", "lecam"} <= {
            n for n in records[10] if f"weighted/{n}" in records[10]
        }
