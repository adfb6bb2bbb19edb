"""Prediction of a rank's memory by ratio and number of images, without a GPU.

Memory between steps follows from the sizes of the models and the ZeRO stage. Memory during a step is counted
on fake tensors after each operator of both models' forward and backward passes. Every tensor's size is affine
in the number of images and the order of operators is fixed. Two counts at small batches therefore determine
every batch size exactly. Library workspaces, allocator fragmentation and the CUDA context are not counted;
`HEADROOM` is reserved for them.
"""

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cat_fast.training.config.deepspeed_json import read_deepspeed_config
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.tokenizer.live_bytes import LiveBytes
from cat_fast.training.tokenizer.synthetic_step import Workload

HEADROOM = 0.1
"""Fraction of a GPU's memory reserved for uncounted memory; an assumption, not a measurement."""
_TRACED = (2, 3)
"""Batch sizes that are counted. A single image may have another layout: channels-last is ambiguous for it."""


@dataclass(frozen=True, kw_only=True)
class Zero:
    """Memory for weights, gradients and optimizer states under ZeRO (as in DeepSpeed's stage_1_and_2.py)."""

    stage: int
    ranks: int
    bucket_bytes: int
    """Size of the buffers for gradient reduction, which exist during the backward pass."""

    @classmethod
    def of_run(cls, config: TokenizerRun, ranks: int) -> "Zero":
        """Create from the DeepSpeed file of a run, with the defaults of runs on GPUs."""
        deepspeed = read_deepspeed_config(config.deepspeed)
        deepspeed.get("zero_optimization", {}).setdefault("overlap_comm", True)
        return cls.from_config(deepspeed, ranks)

    @classmethod
    def from_config(cls, deepspeed: Mapping[str, Any], ranks: int) -> "Zero":
        """Create from a DeepSpeed configuration, with DeepSpeed's defaults."""
        zero = deepspeed.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        buffers = 1 + bool(zero.get("overlap_comm", False))
        contiguous = stage > 0 and zero.get("contiguous_gradients", True)
        bucket = int(zero.get("reduce_bucket_size", 500_000_000)) * 4 * buffers
        return cls(stage=stage, ranks=ranks, bucket_bytes=bucket if contiguous else 0)

    def at_rest(self, parameters: int) -> dict[str, int]:
        """Return the bytes held between steps; under ZeRO a rank has two copies of weights it updates."""
        own = parameters // self.ranks if self.stage else parameters
        return {
            "weights": 4 * parameters,
            "master weights": 4 * own if self.stage else 0,
            "optimizer": 8 * own,
        }

    def gradient_bytes(self, parameters: int) -> int:
        """Return the bytes of gradients after the backward pass."""
        return 4 * (parameters // self.ranks if self.stage == 2 else parameters)

    def optimizer_step_bytes(self, parameters: int) -> int:
        """Return the additional bytes during an optimizer step: gradients, a flat copy, two temporaries."""
        own = parameters // self.ranks if self.stage else parameters
        copies = 3 if self.stage else 2
        return self.gradient_bytes(parameters) + 4 * own * copies


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step's tensors at one ratio, after each operator: base + slope * images."""

    base: np.ndarray
    slope: np.ndarray
    minimum: int
    """Bytes that a step needs for any number of images, for the optimizers."""

    def peak(self, images: int) -> int:
        return max(int((self.base + self.slope * images).max()), self.minimum)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted memory in bytes of rank 0, which also keeps the averaged weights."""

    at_rest: Mapping[str, int]
    steps: Mapping[int, StepMemory]

    def peak(self, ratio: int, images: int) -> int:
        """Return the peak memory of a step in bytes."""
        return sum(self.at_rest.values()) + self.steps[ratio].peak(images)

    def largest_batch(self, ratio: int, capacity: float) -> int:
        """Return the largest batch that fits into `capacity` bytes minus HEADROOM; 0 if none does."""
        low, high = 0, 1
        while self.peak(ratio, high) <= capacity * (1 - HEADROOM):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.peak(ratio, middle) <= capacity * (1 - HEADROOM)
            low, high = (middle, high) if fits else (low, middle)
        return low


def plan_memory(config: TokenizerRun, ranks: int = 1) -> MemoryPlan:
    """Predict the memory of a tokenizer run on `ranks` ranks after the GAN has started.

    Allocates no tensor memory.

    Raises:
        UserError: the model or the DeepSpeed configuration is invalid.
    """
    zero = Zero.of_run(config, ranks)
    with FakeTensorMode():
        workload = Workload(config, "cpu")
        ratios = workload.model.ratios
        steps = {ratio: _step_memory(workload, ratio, zero) for ratio in ratios}
        trained = [_size(parameters) for parameters in workload.trained.values()]
        at_rest = {
            name: sum(zero.at_rest(parameters)[name] for parameters in trained) for name in zero.at_rest(0)
        }
        at_rest["EMA"] = 4 * _size(workload.model.parameters())
        at_rest["frozen networks, buffers"] = sum(tensor.nbytes for tensor in workload.frozen)
    return MemoryPlan(at_rest=at_rest, steps=steps)


def _step_memory(workload: Workload, ratio: int, zero: Zero) -> StepMemory:
    few, more = (np.array(trace(workload, ratio, count, zero)) for count in _TRACED)
    assert len(few) == len(more), "the order of operators must not depend on the batch size"
    slope = (more - few) / (_TRACED[1] - _TRACED[0])
    minimum = max(zero.optimizer_step_bytes(_size(p)) for p in workload.trained.values())
    return StepMemory(few - slope * _TRACED[0], slope, minimum)


def trace(workload: Workload, ratio: int, count: int, zero: Zero | None = None) -> list[int]:
    """Return the live bytes of a step after each operator of both models' forward and backward passes.

    Gradients are kept as under `zero`, or until the optimizer's step if it is None.
    """
    trained = workload.trained
    existing = [*workload.frozen, *(tensor for parameters in trained.values() for tensor in parameters)]
    gc.collect()
    gc.disable()  # a collection during one of the two counts would make them differ
    try:
        with LiveBytes(existing) as bytes_:
            batch = workload.batch(ratio, count)
            with _Gradients(trained[workload.model], bytes_, zero):
                reconstructions = workload.reconstruct(batch)
            if workload.adversarial:
                with _Gradients(trained[workload.discriminator], bytes_, zero):
                    workload.discriminate(batch, reconstructions, r1=True)
            del batch, reconstructions
    finally:
        gc.enable()
    return bytes_.timeline


class _Gradients:
    """Context that accounts for the gradients of parameters under ZeRO until the optimizer's step."""

    def __init__(self, parameters: Sequence[Tensor], bytes_: LiveBytes, zero: Zero | None) -> None:
        self.parameters, self.bytes, self.zero = parameters, bytes_, zero
        self.held = 0
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        if self.zero is not None and self.zero.stage:
            self.handles = [
                p.requires_grad_(True).register_post_accumulate_grad_hook(self._reduce)
                for p in self.parameters
            ]

    def __exit__(self, *_: object) -> None:
        self.bytes.hold(-self.held)
        for parameter in self.parameters:
            parameter.grad = None
        for handle in self.handles:
            handle.remove()

    def _reduce(self, parameter: Tensor) -> None:
        assert self.zero is not None
        partitioned = self.zero.stage == 2
        if not self.held:
            own = self.zero.gradient_bytes(_size(self.parameters)) if partitioned else 0
            self.held = self.zero.bucket_bytes + own
            self.bytes.hold(self.held)
        if partitioned:  # it is in the bucket, which is reduced to the rank that updates the parameter
            parameter.grad = None


def _size(parameters: Iterable[Tensor]) -> int:
    """Return the number of elements."""
    return sum(p.numel() for p in parameters)
