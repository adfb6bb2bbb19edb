"""Where a model's time and memory go: seconds and live bytes by kind of work, operator by operator."""

import time
import weakref
from collections.abc import Callable
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
"""By what stands in an operator's name. The autoencoder's matrix products are its attention's projections."""
REST = "rest"


def breakdown(run: Callable[[], Any]) -> dict[str, Any]:
    """Run once more, operator by operator.

    Returns `seconds`, of each kind of work, and in `peak_bytes` the tensors alive when most was, by the kind
    of work that made them: what there was before, such as weights, does not count. `workspace` is what the
    run took beyond its tensors at their height: buffers of operators and gaps of the allocator; None where
    the system does not tell.
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


def kind_of(operator: str) -> str:
    """The kind of work of an operator such as `aten::convolution_backward`."""
    name = operator.split("::")[-1]
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return REST


class Recorder(TorchDispatchMode):
    """Times every operator within it, and follows the storages they make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys((*KINDS, REST), 0.0)
        self.live = dict.fromkeys((*KINDS, REST), 0)
        self.peak = dict(self.live)
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.known.add(tensor.untyped_storage())  # if it is not ours, it was there before
        machine.synchronize()
        start = time.perf_counter()
        result = func(*args, **kwargs)
        machine.synchronize()
        kind = kind_of(func.name())
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
