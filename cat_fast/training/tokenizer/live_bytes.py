"""Tracking of live tensor memory after each operator, for real or fake tensors."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of storages that operators allocate, until they are freed.

    `timeline` holds the live bytes after each operator. Existing storages, such as weights, do not count, and
    views count once. Memory that an operator allocates and frees internally is not seen.

    Args:
        existing: tensors that were allocated before and may appear as results.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.timeline: list[int] = []
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in existing:
            self._known.add(tensor.untyped_storage())

    @property
    def peak(self) -> int:
        return max(self.timeline, default=0)

    def hold(self, size: int) -> None:
        """Add `size` bytes, which may be negative, for memory that no operator allocates."""
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
