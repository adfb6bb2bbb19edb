"""Arguments of tiny runs, and functions to start them with and without the DeepSpeed launcher."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from cat_fast.training.runtime.ranks import free_port

ROOT = Path(__file__).parents[2]

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
    "linear_backend=mkl",
]


def settings(kind: str, out: Path, latents: Path, *more: str) -> list[str]:
    """Return the arguments of `cat_fast.train`."""
    config, *overrides = TOKENIZER if kind == "tokenizer" else [*GENERATOR, f"data.latents={latents}"]
    return [config, f"output_dir={out}", *overrides, "schedule.warmup_steps=2", *more]


def command(kind: str, out: Path, latents: Path, *more: str) -> list[str]:
    """Return the command line that starts a run on two ranks with the launcher."""
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()),
        *("--module", "cat_fast.train", *settings(kind, out, latents, *more)),
    ]


def train_as_rank(*arguments: str) -> None:
    """Train as one of the ranks of `run_ranks`, without the launcher."""
    from cat_fast.train import main

    sys.exit(main([*arguments]))


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


def finish(process: subprocess.Popen, log: Path) -> None:
    try:
        assert process.wait(timeout=500) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
