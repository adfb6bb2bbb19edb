"""Cases that compare the generator's training with plain torch: a tiny DiT and latents of three ratios.

They are shared by the ranks (`generator_worker.py`) and by plain torch (`plain_generator.py`).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cat_fast.config import fill
from cat_fast.training.config.deepspeed_json import read_deepspeed_config
from cat_fast.training.config.settings import GeneratorRun

STEPS = 10
CHECKPOINT_STEP = 5
"""Number of steps after which a checkpoint is written."""
WORLD_SIZE = 2
LR = 1e-4

PARTITIONED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""By default ZeRO 3 does not partition parameters as small as all those of these models."""


@dataclass(frozen=True, eq=False)
class Case:
    """One training, under one DeepSpeed configuration."""

    name: str
    stage: int
    bucket: int = 5_000_000
    zero: dict[str, Any] = field(default_factory=dict)
    accumulation_steps: int = 1
    weighting: str = "token"
    max_grad_norm: float = 1e9
    precision: str = "fp32"
    checkpointing: bool = False
    linear_backend: str = "mkl"

    def run(self, folder: Path, latents: Path) -> GeneratorRun:
        """Return the configuration; write the DeepSpeed JSON to `folder`."""
        path = folder / f"{self.name}.json"
        shipped = read_deepspeed_config(f"deepspeed/zero{self.stage}.json")
        shipped["zero_optimization"] |= {"reduce_bucket_size": self.bucket, **self.zero}
        path.write_text(json.dumps(shipped))
        values = {
            "task": "generator",
            "output_dir": str(folder / "run"),
            "seed": 3,
            "deepspeed": str(path),
            "precision": self.precision,
            "gradient_checkpointing": self.checkpointing,
            "linear_backend": self.linear_backend,
            "accumulation_steps": self.accumulation_steps,
            "model": {"hidden_size": 16, "depth": 2, "num_heads": 2, "position_frame": 8},
            "optimizer": {"lr": LR, "weight_decay": 0.1, "max_grad_norm": self.max_grad_norm},
            "schedule": {"total_steps": STEPS},
            "data": {"latents": str(latents), "max_tokens": 96, "window": 8},
            "loss": {"weighting": self.weighting},
        }
        return fill(GeneratorRun, values, [])


CASES = (
    Case("zero1", stage=1),
    Case("zero2_images", stage=2, weighting="image"),
    Case("zero2_onednn", stage=2, linear_backend="onednn"),
    Case("zero3", stage=3),
    Case("zero3_in_pieces", stage=3, bucket=500, zero=PARTITIONED),
    Case("zero3_checkpointed", stage=3, zero=PARTITIONED, checkpointing=True),
    Case("zero3_accumulated_clipped", stage=3, zero=PARTITIONED, accumulation_steps=2, max_grad_norm=0.05),
    Case("zero3_bf16", stage=3, zero=PARTITIONED, precision="bf16"),
)
