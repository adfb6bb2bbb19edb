"""Full training state of a DeepSpeed engine, gathered from all ranks."""

from typing import Any

import torch


def full_state(engine: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Return full fp32 weights and moments of every parameter, and the optimiser's step as `<prefix>.step`.

    Collective: every rank must call it.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = {}
    for name, parameter in engine.module.named_parameters():
        state[f"{prefix}.weight.{name}"] = safe_get_full_fp32_param(parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{prefix}.{moment}.{name}"] = safe_get_full_optimizer_state(parameter, moment)
    steps = {float(entry["step"]) for entry in engine.optimizer.optimizer.state.values()}
    state[f"{prefix}.step"] = torch.tensor(sorted(steps))
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


def forward_weights(engine: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights that this rank's next forward pass would use.

    Collective: every rank must call it.
    """
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[f"{prefix}.weight.{name}"] = parameter.detach().clone().contiguous()
    return weights
