"""All that a DeepSpeed engine keeps of a training, put together from the ranks."""

from typing import Any

import torch


def full_state(engine: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Collective: fp32 weights and both moments of every parameter, whole, whichever rank keeps them.

    And how many steps the optimiser took, as `<prefix>.step`.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = {}
    for name, parameter in engine.module.named_parameters():
        state[f"{prefix}.weight.{name}"] = safe_get_full_fp32_param(parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{prefix}.{moment}.{name}"] = safe_get_full_optimizer_state(parameter, moment)
    steps = {float(of_one["step"]) for of_one in engine.optimizer.optimizer.state.values()}
    state[f"{prefix}.step"] = torch.tensor(sorted(steps))
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


def forward_weights(engine: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Collective: the weights that this rank's next forward pass would use."""
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[f"{prefix}.weight.{name}"] = parameter.detach().clone().contiguous()
    return weights
