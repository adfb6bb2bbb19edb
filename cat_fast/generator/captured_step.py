"""`CapturedStep`: the transformer's forward pass on fixed buffers, as one CUDA graph per size of the buffers.

    forward = captured_step(model)
    prediction = forward(packed, text)

A CUDA graph replays the launches of a pass without their cost on the host, but only for the shapes and
addresses that it was captured with. Steps are therefore filled up to a few sizes (`step_pack.Filling` with
buckets) and copied into the buffers of their size.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch

from cat_fast.errors import first_line
from cat_fast.generator.dit import DiT
from cat_fast.generator.packed_text import PackedText
from cat_fast.packing import PackedSequence

MAX_SIZES = 32
"""Sizes whose graphs are kept; beyond, the least recently used one is dropped."""
WARM_UPS = 2
"""Passes before a capture: they compile kernels and allocate workspaces, which a capture must not."""
_LOG = logging.getLogger("cat_fast.generator")


def predict(model: DiT, packed: PackedSequence, text: PackedText | None) -> torch.Tensor:
    """Return the model's prediction (T, C) for a pack, float32."""
    return model(packed, text=text, return_dict=False)[0].float()


class StepBuffers:
    """A pack and its text at fixed addresses, which later steps of the same shapes are copied to."""

    def __init__(self, packed: PackedSequence, text: PackedText | None) -> None:
        copies = {name: x.clone() for name, x in vars(packed).items() if isinstance(x, torch.Tensor)}
        self.packed = packed.replace(**copies, max_seqlen=packed.max_seqlen)
        self.text = text and replace(
            text, tokens=text.tokens.clone(), cu_seqlens=text.cu_seqlens.clone(), lengths=None
        )

    def load(self, packed: PackedSequence, text: PackedText | None) -> None:
        """Copy a step to the buffers, within the device."""
        for buffers, given in ((self.packed, packed), (self.text, text)):
            for name, buffer in vars(buffers).items() if buffers is not None else ():
                if isinstance(buffer, torch.Tensor):
                    buffer.copy_(getattr(given, name), non_blocking=True)


class Captured(Protocol):
    """Captured forward pass for one size of a step."""

    def replay(self, packed: PackedSequence, text: PackedText | None) -> torch.Tensor:
        """Return the prediction for a step; the next replay overwrites it."""
        ...


class CudaGraph:
    """Forward pass on buffers, captured as a CUDA graph.

    Args:
        model: in evaluation mode.
        packed, text: a step of the size to capture.
        pool: memory pool that graphs share, since only one of them runs at a time.
    """

    def __init__(self, model: DiT, packed: PackedSequence, text: PackedText | None, pool: Any) -> None:
        self._buffers = StepBuffers(packed, text)
        step, current = self._buffers, torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                predict(model, step.packed, step.text)
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # other threads, such as the decoder's, may allocate memory meanwhile
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._prediction = predict(model, step.packed, step.text)

    def replay(self, packed: PackedSequence, text: PackedText | None) -> torch.Tensor:
        self._buffers.load(packed, text)
        self._graph.replay()
        return self._prediction


@dataclass(kw_only=True)
class CaptureReport:
    """Use of CUDA graphs by one model."""

    graphs: int = 0
    """Number of captured graphs, dropped ones included."""
    replayed: int = 0
    """Number of steps that replayed a graph."""
    eager: int = 0
    """Number of steps without one: the first of each size, and all after a failure."""
    failure: str | None = None
    """Why graphs are not used; None while they are."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class CapturedStep:
    """Forward pass of a model, captured when a size comes for the second time.

    If a capture fails, this and all later steps run without graphs, with one line in the log.

    Args:
        model: in evaluation mode, on a GPU.
        capture: captures a size; tests pass one that needs no GPU.
    """

    def __init__(self, model: DiT, capture: Callable[..., Captured] = CudaGraph) -> None:
        self._model = ref(model)  # `captured_step` must not keep the model alive
        self._capture = capture
        self._by_size: OrderedDict[tuple[Any, ...], Captured | None] = OrderedDict()
        self._weights: tuple[Any, ...] = ()
        self._pool: Any = None
        self._lock = threading.Lock()
        failure = "the transformer is offloaded" if hasattr(model, "_hf_hook") else None
        self.report = CaptureReport(failure=failure)

    def __call__(self, packed: PackedSequence, text: PackedText | None) -> torch.Tensor:
        """Return the prediction (T, C) for a pack, float32."""
        model = self._model()
        assert model is not None
        with self._lock, torch.cuda.device_of(packed.tokens):
            captured = None if self.report.failure else self._find(model, packed, text)
            if captured is None:
                self.report.eager += 1
                return predict(model, packed, text)
            self.report.replayed += 1
            return captured.replay(packed, text).clone()

    def _find(self, model: DiT, packed: PackedSequence, text: PackedText | None) -> Captured | None:
        """Return the captured pass of a step's size; None at its first step, or if the capture fails."""
        self._drop_if_moved(next(model.parameters()))
        size = _size(packed, text)
        if size not in self._by_size:
            self._by_size[size] = None
            if len(self._by_size) > MAX_SIZES:
                self._by_size.popitem(last=False)
            return None
        self._by_size.move_to_end(size)
        if self._by_size[size] is None:
            try:
                self._by_size[size] = self._capture(model, packed, text, self._pool)
            except Exception as error:
                self.report.failure = f"capture failed: {first_line(error)}"
                self._by_size.clear()
                _LOG.warning("CUDA graphs are not used for sampling: %s", self.report.failure)
                return None
            self.report.graphs += 1
        return self._by_size[size]

    def _drop_if_moved(self, weight: torch.Tensor) -> None:
        """Drop all graphs if the weights, of which one is given, are not where they were at their capture."""
        if self._weights != (place := (weight.device, weight.dtype, weight.data_ptr())):
            self._by_size.clear()
            self._weights = place
            self._pool = torch.cuda.graph_pool_handle() if weight.device.type == "cuda" else None


def _size(packed: PackedSequence, text: PackedText | None) -> tuple[Any, ...]:
    size: tuple[Any, ...] = (packed.tokens.shape, len(packed), packed.max_seqlen)
    return size if text is None else (*size, text.tokens.shape, text.tokens.dtype, text.max_seqlen)


_STEPS: "WeakKeyDictionary[DiT, CapturedStep]" = WeakKeyDictionary()


def captured_step(model: DiT) -> CapturedStep:
    """Return the `CapturedStep` of a model, one for all engines that run it."""
    if model not in _STEPS:
        _STEPS[model] = CapturedStep(model)
    return _STEPS[model]
