"""Whole runs through the DeepSpeed launcher: killed and started again, they end where a straight run does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cat_fast.data.latent_shards import LatentShardWriter
from cat_fast.training.checkpoint import CheckpointStore
from cat_fast.training.distributed import Ranks, free_port
from cat_fast.training.logs import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 24
KILL_AFTER = 9
CHECKPOINT_EVERY = 4

TOKENIZER = [
    "configs/tokenizer/nano.yaml",
    "model.block_out_channels=[4,4,8,8,8,8]",
    "model.norm_num_groups=2",
    "model.latent_channels=4",
    "model.mid_block_attention_head_dim=8",
    "data.image_size=32",
    "data.batch_size=2",
    "data.max_side=64",
    "perceptual_crop=32",
    "discriminator.resolution=16",
    "discriminator.channel_base=128",
    "discriminator.channel_max=16",
    "loss.gan_loss_starting_step=6",
    "loss.adaptive_gan_weight=true",
    "loss.r1_weight=1.0",
    "loss.r1_every_steps=5",
    "loss.lecam_weight=0.01",
]
GENERATOR = [
    "configs/generator/nano.yaml",
    "model.hidden_size=16",
    "model.depth=2",
    "model.num_heads=2",
    "data.max_tokens=128",
    "data.window=16",
]


def write_latents(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    with LatentShardWriter(folder, "0" * 16, resolution=128, class_names=["a", "b"]) as writer:
        for number in range(24):
            ratio = (8, 16, 32)[number % 3]
            latent = torch.randn(4, 128 // ratio, 128 // ratio, generator=generator)
            writer.add(f"picture{number}", latent, label=number % 2, ratio=ratio)
    return folder


def command(kind: str, out: Path, latents: Path) -> list[str]:
    config, *overrides = TOKENIZER if kind == "tokenizer" else [*GENERATOR, f"data.latents={latents}"]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()),
        *("--module", "cat_fast.train", config, f"output_dir={out}", *overrides),
        *(f"schedule.total_steps={STEPS}", "schedule.warmup_steps=2"),
        f"checkpoint.every_steps={CHECKPOINT_EVERY}",
    ]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with log.open("a") as output:
        return subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill_in_mid_step(process: subprocess.Popen, run: Path, log: Path) -> None:
    """SIGKILL to the launcher and all ranks, once a step past a checkpoint has been logged."""
    deadline = time.monotonic() + 500
    while len(read_metrics(run)) < KILL_AFTER:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen, log: Path) -> None:
    try:
        assert process.wait(timeout=500) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_killed_and_started_again_a_run_ends_where_a_straight_run_does(kind, tmp_path):
    latents = write_latents(tmp_path / "latents")
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    log = tmp_path / "log"

    kill_in_mid_step(start(command(kind, killed, latents), log), killed, log)
    assert not (killed / "model").exists()
    left = CheckpointStore(killed / "checkpoints", Ranks()).latest()
    assert left is not None
    assert 0 < left[0] < STEPS
    # What a kill during the writing of the next checkpoint would have left: nobody may take it for one.
    half = killed / "checkpoints" / f"step_{STEPS - 1:08d}"
    half.mkdir()
    (half / "ema.safetensors").write_bytes(b"half")

    finish(start(command(kind, killed, latents), log), log)
    assert f"at step {left[0]} of {STEPS}" in log.read_text()
    assert "no readable manifest" in log.read_text()
    finish(start(command(kind, straight, latents), log), log)

    assert [r["step"] for r in read_metrics(killed)] == list(range(STEPS))
    name = "model/diffusion_pytorch_model.safetensors"
    resumed_weights, straight_weights = load_file(killed / name), load_file(straight / name)
    assert resumed_weights.keys() == straight_weights.keys()
    for key, value in straight_weights.items():
        assert torch.equal(resumed_weights[key], value), key
    losses = [[r["loss"] for r in read_metrics(run)] for run in (killed, straight)]
    assert losses[0] == losses[1]
    if kind == "tokenizer":
        records = read_metrics(straight)
        assert "discriminator" not in records[5]
        assert {"l1", "kl", "st_lpips_alex", "gan", "weighted/gan", "discriminator"} <= records[6].keys()
        assert [step for step, record in enumerate(records) if "r1" in record] == [10, 15, 20]
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
