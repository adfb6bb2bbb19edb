"""Exponential moving average of parameters: whole on rank 0, or under ZeRO-3 each rank's piece of them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cat_fast.training.runtime.ranks import Ranks


class EMA:
    """averaged = decay * averaged + (1 - decay) * current, in float32.

    The decay warms up as (1 + n) / (10 + n) after n updates, so that short runs do not average their
    initialisation. Under ZeRO-3 a rank holds a piece of each parameter only, and averages that: an update
    moves nothing between ranks, and the averages are gathered when they are saved or copied. Files hold whole
    parameters, whatever wrote them, so any stage and number of ranks reads them.

    Args:
        module: the engine's module, once the engine has been made.
    """

    def __init__(self, module: nn.Module, decay: float, ranks: Ranks | None = None) -> None:
        self.module = module
        self.decay = decay
        self.ranks = ranks or Ranks()
        self.updates = 0
        self.in_pieces = any(hasattr(p, "ds_tensor") for p in module.parameters())
        self.averaged = {name: p.float().clone() for name, p in self._current()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self._current():
            self.averaged[name].lerp_(parameter.float(), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module | None) -> None:
        """Collective: write the averages into another instance of the same model, which rank 0 gives."""
        whole = self.gather()
        if module is not None:
            for name, parameter in module.named_parameters():
                parameter.copy_(whole[name])

    def save(self, path: Path) -> None:
        """Collective; rank 0 writes."""
        whole = self.gather()
        if self.ranks.is_main:
            save_file(whole, path, metadata={"updates": str(self.updates)})

    def load(self, path: Path, updates: int) -> None:
        """Every rank takes what it keeps."""
        self.updates = updates
        if self.averaged:
            whole = load_file(path)
            for name, parameter in self.module.named_parameters():
                mine = _piece(whole[name], parameter, self.ranks) if self.in_pieces else whole[name]
                self.averaged[name].copy_(mine)

    def gather(self) -> dict[str, Tensor]:
        """Collective: the averages in the shapes of the model, on rank 0; on the others, nothing."""
        if not self.in_pieces:
            return self.averaged
        whole = {}
        for name, parameter in self.module.named_parameters():
            pieces = _gather(self.averaged[name], self.ranks)
            if self.ranks.is_main:
                shape: Any = parameter.ds_shape  # type: ignore[attr-defined]
                whole[name] = torch.cat(pieces)[: shape.numel()].view(shape).cpu()
        return whole

    def _current(self) -> list[tuple[str, Tensor]]:
        """What this rank averages."""
        parameters: list[tuple[str, Any]] = list(self.module.named_parameters())
        if self.in_pieces:
            return [(name, p.ds_tensor.detach()) for name, p in parameters]
        return [(name, p.detach()) for name, p in parameters] if self.ranks.is_main else []


def _piece(whole: Tensor, parameter: Any, ranks: Ranks) -> Tensor:
    """This rank's piece of a parameter as ZeRO-3 cuts it: flat, in equal pieces, zeros at the end."""
    size = parameter.ds_tensor.numel()
    flat = nn.functional.pad(whole.flatten(), (0, size * ranks.world_size - whole.numel()))
    return flat[size * ranks.rank : size * (ranks.rank + 1)]


def _gather(piece: Tensor, ranks: Ranks) -> list[Tensor]:
    """All ranks' pieces, in their order, on rank 0."""
    if ranks.world_size == 1:
        return [piece]
    pieces = [torch.empty_like(piece) for _ in range(ranks.world_size)] if ranks.is_main else None
    torch.distributed.gather(piece, pieces, dst=0)
    return pieces or []
