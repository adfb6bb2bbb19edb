"""How many bytes of tensors are alive, operator by operator: of real ones, or of fake ones that hold none."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make within it, until they are freed.

    `timeline` holds the live bytes after each operator. Storages that were there before, such as weights, do
    not count, views count once, and what an operator takes and gives back while it runs is not seen.

    Args:
        before: tensors that were there before and might be met.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.timeline: list[int] = []
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in before:
            self._known.add(tensor.untyped_storage())

    @property
    def peak(self) -> int:
        return max(self.timeline, default=0)

    def hold(self, size: int) -> None:
        """Count `size` bytes more, of something that no operator here makes; less if negative."""
        self.live += size
        self.timeline.append(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor) not in given:
                self._follow(tensor.untyped_storage())
        self.timeline.append(self.live)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.live -= size
