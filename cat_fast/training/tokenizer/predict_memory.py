"""How much memory a rank needs: predicted, without a GPU, by ratio and number of images.

What a model holds at rest is added up from its sizes and the ZeRO stage. What a step holds while it runs is
counted on fake tensors, operator by operator, through the forward and backward passes of both models. Every
tensor's size is affine in the number of images and operators come in one order, so two counts at small
batches give every batch exactly. Not counted: workspaces of libraries, gaps of allocators, the CUDA context
(`HEADROOM` is kept for them).
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cat_fast.training.config.deepspeed_json import read_deepspeed_config
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.tokenizer.live_bytes import LiveBytes
from cat_fast.training.tokenizer.synthetic_step import Workload

HEADROOM = 0.1
"""Share of a card that is left for what is not counted; an assumption, not a measurement."""
_TRACED = (2, 3)
"""Batches that are counted. One image alone is laid out otherwise: channels-last is ambiguous for it."""


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What DeepSpeed does with weights, gradients and optimiser states (checked in its stage_1_and_2.py)."""

    stage: int
    ranks: int
    bucket_bytes: int
    """Buffers in which gradients are reduced, alive during the backward pass."""

    @classmethod
    def of(cls, deepspeed: Mapping[str, Any], ranks: int) -> "Zero":
        """From a DeepSpeed configuration, with DeepSpeed's defaults."""
        zero = deepspeed.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        buffers = 1 + bool(zero.get("overlap_comm", False))
        contiguous = stage > 0 and zero.get("contiguous_gradients", True)
        bucket = int(zero.get("reduce_bucket_size", 500_000_000)) * 4 * buffers
        return cls(stage=stage, ranks=ranks, bucket_bytes=bucket if contiguous else 0)

    def at_rest(self, parameters: int) -> dict[str, int]:
        """Bytes between steps, for fp32 weights: ZeRO keeps a second copy of those that a rank updates."""
        own = parameters // self.ranks if self.stage else parameters
        return {
            "weights": 4 * parameters,
            "master weights": 4 * own if self.stage else 0,
            "optimizer": 8 * own,
        }

    def kept_gradients(self, parameters: int) -> int:
        """Bytes of gradients after the backward pass."""
        return 4 * (parameters // self.ranks if self.stage == 2 else parameters)

    def stepping(self, parameters: int) -> int:
        """Bytes while the optimiser steps, beside those at rest: gradients, a flat copy, two temporaries."""
        own = parameters // self.ranks if self.stage else parameters
        copies = 3 if self.stage else 2
        return self.kept_gradients(parameters) + 4 * own * copies


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step's own tensors at one ratio, moment by moment: base + slope * images."""

    base: np.ndarray
    slope: np.ndarray
    least: int
    """What a step takes with however few images: the optimisers'."""

    def peak(self, images: int) -> int:
        return max(int((self.base + self.slope * images).max()), self.least)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The prediction; all in bytes, for rank 0, which also keeps the averaged weights."""

    at_rest: Mapping[str, int]
    steps: Mapping[int, StepMemory]

    def peak(self, ratio: int, images: int) -> int:
        """The most that a rank holds in a step."""
        return sum(self.at_rest.values()) + self.steps[ratio].peak(images)

    def largest_batch(self, ratio: int, capacity: float) -> int:
        """The most images whose step stays within `capacity` bytes, less HEADROOM; 0 if none does."""
        low, high = 0, 1
        while self.peak(ratio, high) <= capacity * (1 - HEADROOM):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.peak(ratio, middle) <= capacity * (1 - HEADROOM)
            low, high = (middle, high) if fits else (low, middle)
        return low


def plan_memory(config: TokenizerRun, ranks: int = 1) -> MemoryPlan:
    """Predict the memory of a run of the tokenizer on `ranks` ranks, once its GAN has started.

    Nothing is allocated.

    Raises:
        UserError: the model or the DeepSpeed configuration cannot be used.
    """
    zero = Zero.of(read_deepspeed_config(config.deepspeed), ranks)
    with FakeTensorMode():
        workload = Workload(config, "cpu")
        ratios = workload.model.ratios
        steps = {ratio: _step_memory(workload, ratio, zero) for ratio in ratios}
        trained = [_size(workload.model), _size(workload.discriminator)]
        at_rest = {
            name: sum(zero.at_rest(parameters)[name] for parameters in trained) for name in zero.at_rest(0)
        }
        at_rest["EMA"] = 4 * trained[0]
        frozen = [t for network in workload.frozen for t in (*network.parameters(), *network.buffers())]
        buffers = [*workload.model.buffers(), *workload.discriminator.buffers()]
        at_rest["loss networks, buffers"] = sum(tensor.nbytes for tensor in frozen + buffers)
    return MemoryPlan(at_rest=at_rest, steps=steps)


def _step_memory(workload: Workload, ratio: int, zero: Zero) -> StepMemory:
    few, more = (np.array(trace(workload, ratio, count, zero)) for count in _TRACED)
    assert len(few) == len(more), "operators come in one order, whatever the batch"
    slope = (more - few) / (_TRACED[1] - _TRACED[0])
    least = max(zero.stepping(_size(m)) for m in (workload.model, workload.discriminator))
    return StepMemory(few - slope * _TRACED[0], slope, least)


def trace(workload: Workload, ratio: int, count: int, zero: Zero | None = None) -> list[int]:
    """Live bytes of a step's tensors after each operator: both models' forward and backward passes.

    Gradients live as `zero` has it, or, for None, until the optimiser has stepped.
    """
    modules = (workload.model, workload.discriminator, *workload.frozen)
    before = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    gc.collect()
    gc.disable()  # a collection in the middle of one count would set it apart from the other
    try:
        with LiveBytes(before) as bytes_:
            batch = workload.batch(ratio, count)
            with _Gradients(workload.model, bytes_, zero):
                reconstructions = workload.generate(batch)
            if workload.adversarial:
                with _Gradients(workload.discriminator, bytes_, zero):
                    workload.judge(batch, reconstructions, r1=True)
            del batch, reconstructions
    finally:
        gc.enable()
    return bytes_.timeline


class _Gradients:
    """Keeps a module's gradients as ZeRO does, from the first one to the optimiser's step."""

    def __init__(self, module: nn.Module, bytes_: LiveBytes, zero: Zero | None) -> None:
        self.module, self.bytes, self.zero = module, bytes_, zero
        self.held = 0
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        if self.zero is not None and self.zero.stage:
            parameters = self.module.requires_grad_(True).parameters()
            self.handles = [p.register_post_accumulate_grad_hook(self._reduce) for p in parameters]

    def __exit__(self, *_: object) -> None:
        self.bytes.hold(-self.held)
        self.module.zero_grad(set_to_none=True)
        for handle in self.handles:
            handle.remove()

    def _reduce(self, parameter: Tensor) -> None:
        assert self.zero is not None
        partitioned = self.zero.stage == 2
        if not self.held:
            own = self.zero.kept_gradients(_size(self.module)) if partitioned else 0
            self.held = self.zero.bucket_bytes + own
            self.bytes.hold(self.held)
        if partitioned:  # it goes into the bucket, and from there to the rank that updates it
            parameter.grad = None


def _size(module: nn.Module) -> int:
    """Parameters, in numbers."""
    return sum(p.numel() for p in module.parameters())
