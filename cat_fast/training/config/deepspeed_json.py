"""Loading and validation of DeepSpeed's JSON files."""

import importlib.resources
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cat_fast.errors import UserError

ZERO_STAGES = (0, 1, 2, 3)
WHOLE_WEIGHT_STAGES = (0, 1, 2)
"""Stages of tasks that use weights without DeepSpeed's engine, where stage 3 has partitioned them: in a GAN
the autoencoder's step calls the discriminator, others evaluate their model. Under stage 3 a discriminator
that is called twice in one step also gets wrong gradients without an error."""
PRECISIONS = ("fp32", "bf16")

_PRECISION_SECTIONS = ("fp16", "bf16", "torch_autocast")
_SET_BY_RUN = {
    "train_batch_size": "those of data",
    "train_micro_batch_size_per_gpu": "those of data",
    "gradient_accumulation_steps": "accumulation_steps",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "those of optimizer",
    "scheduler": "those of schedule",
}
"""Keys that the run's configuration determines -> its own keys."""


def read_deepspeed_config(name: str, stages: Collection[int] = ZERO_STAGES) -> dict[str, Any]:
    """Load the DeepSpeed JSON file `name`: a path, or the name of a packaged config.

    Raises:
        UserError: the file is missing or not valid JSON, its ZeRO stage is not one of `stages`, or it sets
            what belongs in the run's configuration, such as a precision or an optimizer.
    """
    for path in (Path(name), importlib.resources.files("cat_fast.configs") / name):
        if path.is_file():
            try:
                config = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"deepspeed: {path} is not valid JSON ({error})") from error
            if not isinstance(config, dict):
                raise UserError(f"deepspeed: {path}: expected a JSON object, got {config!r}")
            _check(config, str(path), stages)
            return config
    raise UserError(f"deepspeed: {name} is neither a file nor a packaged config (deepspeed/zero1.json, …)")


def _check(config: dict[str, Any], path: str, stages: Collection[int]) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in ZERO_STAGES:
        raise UserError(f"deepspeed: {path}: expected ZeRO stage 0, 1, 2 or 3, got {stage}")
    if stage not in stages:
        raise UserError(
            f"deepspeed: {path} sets ZeRO stage {stage}, which partitions weights that this task uses "
            "without DeepSpeed's engine, such as a discriminator's. Use deepspeed/zero1.json or zero2.json; "
            "stage 3 is for the generator"
        )
    for section in _PRECISION_SECTIONS:
        if config.get(section, {}).get("enabled"):
            raise UserError(
                f"deepspeed: {path} enables {section}; set precision={'|'.join(PRECISIONS)} in the run's "
                "configuration instead, which keeps the discriminator in fp32"
            )
    if key := next((key for key in _SET_BY_RUN if key in config), None):
        raise UserError(
            f"deepspeed: {path} sets {key}; remove it and set the run's own keys instead: {_SET_BY_RUN[key]}"
        )
