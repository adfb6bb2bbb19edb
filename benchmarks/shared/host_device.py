"""Dispatch mode that fails where the host would wait for a device, and counts what is launched on it."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_READS = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
)
_INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
_COPIES = (aten._to_copy, aten.copy_)


class Synchronized(AssertionError):
    """The host would wait for the device, or copy between the two."""


class NoSynchronization(TorchDispatchMode):
    """Fail on `.item()`, `.tolist()`, boolean indices and copies between the host and `device`.

    Meta tensors, or fake tensors of a GPU, stand for those of a device.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.launches: Counter[str] = Counter()
        """Number of calls per operator that write to the device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet, kwargs = function.overloadpacket, kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = any(self._holds(x) for x in inputs)
        if here and packet in _READS:
            raise Synchronized(str(function))
        if packet in _INDEXED and any(self._holds(x) and x.dtype == torch.bool for x in tree_leaves(args[1])):
            raise Synchronized(f"{function} with a boolean index")
        result = function(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if packet in _COPIES:
            places = {self._holds(x) for x in (*inputs, *outputs) if x.numel() > 1 or x.dim()}
            if len(places) > 1:
                raise Synchronized(f"{function} between the host and the device")
        writes = any(map(self._holds, outputs)) or (here and function._schema.is_mutable)
        if writes and not function.is_view:
            self.launches[str(packet)] += 1
        return result

    def _holds(self, x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.device.type == self.device
