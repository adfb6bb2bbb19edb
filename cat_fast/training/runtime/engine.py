"""DeepSpeed engines: one per model, with our own optimiser and schedule, and ZeRO from a JSON file."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cat_fast.hardware import run_device_type
from cat_fast.training.config.deepspeed_json import read_deepspeed_config
from cat_fast.training.config.settings import OptimizerConfig, ScheduleConfig


def make_engine(
    module: nn.Module,
    optimizer: OptimizerConfig,
    deepspeed_json: str,
    accumulation_steps: int = 1,
    precision: str = "fp32",
) -> Any:
    """Return a DeepSpeed engine around `module` with AdamW.

    Call `engine.step()` after each `engine.backward(loss)`; every `accumulation_steps`-th call updates the
    weights by the mean of the gradients. DeepSpeed gets a micro batch size of 1: the tasks count their own
    images and tokens.

    With `precision="bf16"` the module's forward pass runs under autocast. Weights, gradients, communication
    and optimiser state stay fp32, so checkpoints are those of an fp32 run; outputs may be bf16.

    Raises:
        UserError: the JSON is missing or invalid.
    """
    import deepspeed

    config = read_deepspeed_config(deepspeed_json)
    on_gpu = run_device_type() == "cuda"
    if "zero_optimization" in config:  # gradients are reduced while the others are computed
        config["zero_optimization"].setdefault("overlap_comm", on_gpu and _has_several_ranks())
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        # DeepSpeed's default is 1.0.
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        # Empty, because DeepSpeed communicates the gradients of "safe" modules in bf16.
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    parameters = [p for p in module.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        parameters,
        lr=optimizer.lr,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=True if on_gpu else None,  # one launch instead of several per tensor
    )
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=parameters, optimizer=adamw, config=config, dist_init_required=False
    )
    return engine


def _has_several_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def in_precision(forward: Callable[..., Any], precision: str, device: torch.device) -> Callable[..., Any]:
    """Return a forward pass on `device` that runs in a run's precision, as an engine's does."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return forward(*arguments, **keywords)

    return run


def learning_rate(base: float, schedule: ScheduleConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0.

    A pure function, so that resuming needs no scheduler state.
    """
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
