"""DeepSpeed engines: one a model, with our optimiser, our schedule and ZeRO from a JSON file."""

import importlib.resources
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cat_fast.errors import UserError
from cat_fast.training.settings import OptimizerConfig, ScheduleConfig


def make_engine(module: nn.Module, optimizer: OptimizerConfig, deepspeed_json: str) -> Any:
    """A DeepSpeed engine around `module` with AdamW. One optimiser step follows each backward pass.

    The micro batch size is told to DeepSpeed as 1: batches are counted by the tasks, which know pictures and
    tokens.

    Raises:
        UserError: the JSON is missing or asks for a ZeRO stage that the ghost pass does not cover.
    """
    import deepspeed

    config = read_deepspeed_config(deepspeed_json)
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed clips to 1.0 unless told otherwise.
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    parameters = [p for p in module.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        parameters,
        lr=optimizer.lr,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=parameters, optimizer=adamw, config=config, dist_init_required=False
    )
    return engine


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """The DeepSpeed JSON `name`: a path, or the name of one among the packaged configs."""
    for path in (Path(name), importlib.resources.files("cat_fast.configs") / name):
        if path.is_file():
            try:
                config = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"deepspeed: {path} is no JSON ({error})") from error
            stage = config.get("zero_optimization", {}).get("stage", 0)
            if stage not in (0, 1, 2):
                raise UserError(
                    f"deepspeed: {path} asks for ZeRO stage {stage}; this trainer runs stages 0, 1 and 2"
                )
            return config
    raise UserError(
        f"deepspeed: {name} is neither a file nor among the packaged configs (deepspeed/zero1.json, …)"
    )


def learning_rate(base: float, schedule: ScheduleConfig, step: int) -> float:
    """Rate of a step counted from 0: a pure function, so that resuming needs no scheduler state."""
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return base
    progress = (step - schedule.warmup_steps) / max(1, schedule.total_steps - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return base * (schedule.min_ratio + (1 - schedule.min_ratio) * cosine)


def set_learning_rate(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
