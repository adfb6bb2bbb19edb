"""Exponential moving average of a module's parameters, kept by rank 0."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class EMA:
    """averaged = decay * averaged + (1 - decay) * current, in float32.

    The decay warms up as (1 + n) / (10 + n) after n updates, so that short runs do not average their
    initialisation. Parameters must be whole on this rank (ZeRO stages 0 to 2).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.updates = 0
        self.averaged = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.module.named_parameters():
            self.averaged[name].lerp_(parameter.detach().float(), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into another instance of the same model."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.averaged[name])

    def save(self, path: Path) -> None:
        save_file(self.averaged, path, metadata={"updates": str(self.updates)})

    def load(self, path: Path, updates: int) -> None:
        self.averaged = load_file(path, device=str(next(self.module.parameters()).device))
        self.updates = updates
