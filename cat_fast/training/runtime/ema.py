"""Exponential moving average of parameters: kept on rank 0, or partitioned over ranks under ZeRO-3."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cat_fast.data.files import set_default_mode
from cat_fast.training.runtime.ranks import Ranks


class EMA:
    """averaged = decay * averaged + (1 - decay) * current, in float32.

    The decay warms up as (1 + n) / (10 + n) after n updates, so that short runs do not average their
    initialisation. Under ZeRO-3 each rank averages its own partition of every parameter, so an update needs
    no communication; the averages are gathered when they are saved or copied. Files hold full parameters, so
    any ZeRO stage and any number of ranks can read them.

    Args:
        module: the engine's module, once the engine has been made.
    """

    def __init__(self, module: nn.Module, decay: float, ranks: Ranks | None = None) -> None:
        self.module = module
        self.decay = decay
        self.ranks = ranks or Ranks()
        self.updates = 0
        self.is_partitioned = any(hasattr(p, "ds_tensor") for p in module.parameters())
        self.averaged = {name: p.float().clone() for name, p in self._current()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if current := self._current():
            averaged = [self.averaged[name] for name, _ in current]
            torch._foreach_lerp_(averaged, [parameter.float() for _, parameter in current], 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module | None) -> None:
        """Write the averages into another instance of the same model.

        Collective: every rank must call it; rank 0 passes the module, the others None.
        """
        full = self.gather()
        if module is not None:
            for name, parameter in module.named_parameters():
                parameter.copy_(full[name])

    def save(self, path: Path) -> None:
        """Write the averages to a safetensors file. Collective: every rank must call it; rank 0 writes."""
        full = self.gather()
        if self.ranks.is_main:
            save_file(full, path, metadata={"updates": str(self.updates)})
            set_default_mode(path)

    def load(self, path: Path, updates: int) -> None:
        """Load this rank's averages from a file of `save`, and the number of updates behind them."""
        self.updates = updates
        if self.averaged:
            full = load_file(path)
            for name, parameter in self.module.named_parameters():
                own = _partition(full[name], parameter, self.ranks) if self.is_partitioned else full[name]
                self.averaged[name].copy_(own)

    def gather(self) -> dict[str, Tensor]:
        """Return the averages in the model's shapes on rank 0, an empty dict on the others.

        Collective: every rank must call it.
        """
        if not self.is_partitioned:
            return self.averaged
        full = {}
        for name, parameter in self.module.named_parameters():
            partitions = _gather(self.averaged[name], self.ranks)
            if self.ranks.is_main:
                shape: Any = parameter.ds_shape  # type: ignore[attr-defined]
                full[name] = torch.cat(partitions)[: shape.numel()].view(shape).cpu()
        return full

    def _current(self) -> list[tuple[str, Tensor]]:
        """Return the tensors that this rank averages."""
        parameters: list[tuple[str, Any]] = list(self.module.named_parameters())
        if self.is_partitioned:
            return [(name, p.ds_tensor.detach()) for name, p in parameters]
        return [(name, p.detach()) for name, p in parameters] if self.ranks.is_main else []


def _partition(full: Tensor, parameter: Any, ranks: Ranks) -> Tensor:
    """Return this rank's part of a parameter as ZeRO-3 cuts it: flat, equal parts, zero-padded."""
    size = parameter.ds_tensor.numel()
    flat = nn.functional.pad(full.flatten(), (0, size * ranks.world_size - full.numel()))
    return flat[size * ranks.rank : size * (ranks.rank + 1)]


def _gather(partition: Tensor, ranks: Ranks) -> list[Tensor]:
    """Return the partitions of all ranks, in rank order, on rank 0."""
    if ranks.world_size == 1:
        return [partition]
    partitions = [torch.empty_like(partition) for _ in range(ranks.world_size)] if ranks.is_main else None
    torch.distributed.gather(partition, partitions, dst=0)
    return partitions or []
