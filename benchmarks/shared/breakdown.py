"""Time and memory of a model by kind of work: seconds and live bytes, measured operator by operator."""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.shared import machine

KINDS = {
    "convolution": ("convolution",),
    "norm": ("group_norm", "adaln", "layer_norm"),
    "attention": ("attention", "addmm", "bmm", "mm"),
}
"""Kinds by parts of operator names. The autoencoder's matrix products are projections of its attention."""
REST = "rest"


def breakdown(run: Callable[[], Any]) -> dict[str, Any]:
    """Run once, recording every operator.

    Returns `seconds` per kind of work, and `peak_bytes`: the live tensors at the peak, by the kind of work
    that created them. Tensors that existed before, such as weights, do not count. `workspace` is memory
    beyond these tensors: buffers of operators and gaps of the allocator; None if the system does not report
    it.
    """
    mode = Recorder()

    def recorded() -> None:
        with mode:
            run()

    taken = machine.peak_bytes(recorded)
    held = sum(mode.peak.values())
    return {
        "seconds": mode.seconds,
        "peak_bytes": {**mode.peak, "workspace": None if taken is None else max(0, taken - held)},
    }


def kind_of(operator: str, kinds: Mapping[str, Sequence[str]] = KINDS) -> str:
    """Return the kind of work of an operator such as `aten::convolution_backward`."""
    name = operator.split("::")[-1]
    for kind, parts in kinds.items():
        if any(part in name for part in parts):
            return kind
    return REST


class Recorder(TorchDispatchMode):
    """Context that times every operator and tracks the storages they allocate until they are freed.

    Args:
        kinds: parts of operator names by kind of work; the first match counts.
    """

    def __init__(self, kinds: Mapping[str, Sequence[str]] = KINDS) -> None:
        super().__init__()
        self.kinds = kinds
        self.seconds = dict.fromkeys((*kinds, REST), 0.0)
        self.live = dict.fromkeys((*kinds, REST), 0)
        self.peak = dict(self.live)
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.known.add(tensor.untyped_storage())  # unknown storages existed before
        machine.synchronize()
        start = time.perf_counter()
        result = func(*args, **kwargs)
        machine.synchronize()
        kind = kind_of(func.name(), self.kinds)
        self.seconds[kind] += time.perf_counter() - start
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage(), kind)
        return result

    def _follow(self, storage: torch.UntypedStorage, kind: str) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.live[kind] += size
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)
        weakref.finalize(storage, self._freed, kind, size).atexit = False

    def _freed(self, kind: str, size: int) -> None:
        self.live[kind] -= size
