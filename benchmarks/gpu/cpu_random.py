"""Random numbers of a CPU's generator on any device, so that runs on a GPU draw those of a CPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FACTORIES = (torch.rand, torch.randn, torch.randint, torch.randperm)
_LIKE = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
_IN_PLACE = (torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.bernoulli_)


class CpuRandomness(TorchFunctionMode):
    """Draw on the CPU what would be drawn by the default generator of another device."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is not None:
            return function(*args, **kwargs)
        if function in _FACTORIES:
            device = kwargs.pop("device", None)
            drawn = function(*args, **kwargs, device="cpu")
            return drawn if device is None else drawn.to(device)
        if function in _LIKE:
            kwargs = {"dtype": args[0].dtype, **kwargs}
            return _LIKE[function](args[0].shape, **kwargs, device="cpu").to(args[0].device)
        if function in _IN_PLACE and args[0].device.type != "cpu":
            return args[0].copy_(
                function(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)
            )
        return function(*args, **kwargs)
