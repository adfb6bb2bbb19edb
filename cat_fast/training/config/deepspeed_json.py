"""DeepSpeed's JSON files: where they lie, and what a run may ask for in them."""

import importlib.resources
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cat_fast.errors import UserError

ZERO_STAGES = (0, 1, 2, 3)
GAN_ZERO_STAGES = (0, 1, 2)
"""Of a run with two engines: under stage 3 the weights of a frozen discriminator lie in pieces while the
autoencoder's step calls it past its engine, and one called twice in a step gets wrong gradients silently."""
PRECISIONS = ("fp32", "bf16")

_PRECISION_SECTIONS = ("fp16", "bf16", "torch_autocast")


def read_deepspeed_config(name: str, stages: Collection[int] = ZERO_STAGES) -> dict[str, Any]:
    """The DeepSpeed JSON `name`: a path, or the name of one among the packaged configs.

    Raises:
        UserError: there is none, it is no JSON, its ZeRO stage is not one of `stages`, or it sets a
            precision, which is the run's to set.
    """
    for path in (Path(name), importlib.resources.files("cat_fast.configs") / name):
        if path.is_file():
            try:
                config = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"deepspeed: {path} is no JSON ({error})") from error
            _check(config, str(path), stages)
            return config
    raise UserError(
        f"deepspeed: {name} is neither a file nor among the packaged configs (deepspeed/zero1.json, …)"
    )


def _check(config: dict[str, Any], path: str, stages: Collection[int]) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in ZERO_STAGES:
        raise UserError(f"deepspeed: {path} asks for ZeRO stage {stage}; there are 0, 1, 2 and 3")
    if stage not in stages:
        raise UserError(
            f"deepspeed: {path} asks for ZeRO stage {stage}, and this run trains a GAN: the autoencoder's "
            "step calls the discriminator past its engine, where stage 3 keeps only pieces of its weights. "
            "Use deepspeed/zero1.json or zero2.json; stage 3 is for the generator"
        )
    for section in _PRECISION_SECTIONS:
        if config.get(section, {}).get("enabled"):
            raise UserError(
                f"deepspeed: {path} switches on {section}; say precision={'|'.join(PRECISIONS)} in the run's "
                "configuration instead, which keeps the discriminator in fp32"
            )
