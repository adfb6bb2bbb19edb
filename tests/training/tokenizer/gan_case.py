"""Cases that compare the tokenizer's training with plain torch: two tiny models and each rank's images.

They are shared by the ranks (`gan_worker.py`) and by plain torch (`plain_gan.py`).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cat_fast.config import fill
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.training.config.deepspeed_json import read_deepspeed_config
from cat_fast.training.config.settings import TokenizerRun

RATIOS = (2, 4, 8)
SIDE = 16
STEPS = 10
CHECKPOINT_STEP = 5
"""Number of steps after which a checkpoint is written."""
WORLD_SIZE = 2
LR = 1e-4
GAN_FROM = 1
"""First step with a GAN: the discriminator takes one step less than the autoencoder."""

MODEL = {
    "sample_size": SIDE,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_num_layers": 1,
    "mid_block_attention_head_dim": 16,
    "ratios": list(RATIOS),
}
DISCRIMINATOR = {"resolution": 8, "channel_base": 64, "channel_max": 16}


@dataclass(frozen=True, eq=False)
class Case:
    """One training, under one DeepSpeed configuration."""

    name: str
    stage: int
    bucket: int = 5_000_000
    """Elements per reduction bucket: large enough for a model, or for a few layers."""
    loss: dict[str, Any] = field(default_factory=dict)
    accumulation_steps: int = 1
    unequal: bool = False
    """Rank 1 gets half the images of rank 0."""
    max_grad_norm: float = 1e9
    precision: str = "fp32"
    checkpointing: bool = False
    linear_backend: str = "mkl"
    saved: bool = False
    """True if a checkpoint is also written and resumed."""

    def run(self, folder: Path) -> TokenizerRun:
        """Return the configuration; write the DeepSpeed JSON to `folder`."""
        path = folder / f"{self.name}.json"
        shipped = read_deepspeed_config(f"deepspeed/zero{self.stage}.json")
        shipped["zero_optimization"] |= {"reduce_bucket_size": self.bucket}
        path.write_text(json.dumps(shipped))
        optimizer = {"lr": LR, "weight_decay": 0.1, "max_grad_norm": self.max_grad_norm}
        loss = {"perceptual_weight": 0.0, "kl_weight": 1e-3, "gan_loss_starting_step": GAN_FROM} | self.loss
        values = {
            "task": "tokenizer",
            "output_dir": str(folder / "run"),
            "seed": 5,
            "deepspeed": str(path),
            "precision": self.precision,
            "gradient_checkpointing": self.checkpointing,
            "linear_backend": self.linear_backend,
            "accumulation_steps": self.accumulation_steps,
            "model": MODEL,
            "data": {"image_size": SIDE},
            "optimizer": optimizer,
            "discriminator": {**DISCRIMINATOR, "optimizer": {**optimizer, "betas": [0.5, 0.9]}},
            "schedule": {"total_steps": STEPS},
            "loss": loss,
        }
        return fill(TokenizerRun, values, [])

    def images(self, step: int, rank: int, part: int) -> torch.Tensor:
        count = 1 if self.unequal and rank else 2
        generator = torch.Generator().manual_seed(100 * step + 10 * part + rank)
        return torch.rand(count, 3, SIDE, SIDE, generator=generator) * 2 - 1


def ratio_of(step: int, rank: int, part: int = 0) -> int:
    """Return a rank's ratio in a step; over any nine steps, two ranks draw all nine pairs."""
    return RATIOS[(step if rank == 0 else step // 3) % 3 - part]


EVERYTHING = {"r1_weight": 1.0, "r1_every_steps": 3, "lecam_weight": 0.1}
CASES = (
    Case("zero1", stage=1, saved=True),
    Case("zero1_small_buckets", stage=1, bucket=2_000),
    Case("zero2_onednn", stage=2, linear_backend="onednn", saved=True),
    Case("zero2_small_buckets", stage=2, bucket=2_000),
    Case("zero2_checkpointed", stage=2, bucket=2_000, checkpointing=True),
    Case("zero1_regularised_clipped", stage=1, loss=EVERYTHING, max_grad_norm=0.05),
    Case("zero2_regularised", stage=2, loss=EVERYTHING),
    Case("zero2_bf16", stage=2, loss=EVERYTHING, precision="bf16", saved=True),
    Case("zero2_balanced", stage=2, loss={**EVERYTHING, "adaptive_gan_weight": True}),
    Case("zero1_accumulated", stage=1, loss=EVERYTHING, accumulation_steps=2, unequal=True),
    Case("zero2_accumulated", stage=2, loss=EVERYTHING, accumulation_steps=2, unequal=True),
)


def tiny_models() -> tuple[NestedAutoencoderKL, StyleGANDiscriminator]:
    torch.manual_seed(0)
    return NestedAutoencoderKL(**MODEL), StyleGANDiscriminator(**DISCRIMINATOR)
