"""Work of one rank's complete training step of the paper's runs.

The transformer's operators follow from formulas, the autoencoder's are counted on tensors without memory.

`flops` are those of matrix products of any implementation that computes convolutions by direct products:
attention without recomputed scores or padded heads, no recomputed activations, and nearest-neighbour
upsampling merged into the convolution that follows it. Attention with heads of one dimension counts as zero,
since its sums take linear time. Algorithms such as Winograd's multiply less, but no library uses them in
these formats.

`compulsory` bytes are those of the weights, read once in the dtype of the products, and of the optimizer's
states on this rank, read and written. Activations may stay on chip. `moved` are the bytes that the operators
read and write one after another, without fusion.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bounds.data_sheets import Assumptions, DataSheet
from benchmarks.bounds.kernels import flash_head_dim
from benchmarks.bounds.trace import Call, Trace, require_operators
from benchmarks.shared.configs import generator_run, tokenizer_run
from cat_fast.generator import DiT
from cat_fast.models.build import build_model
from cat_fast.training.checkpoints.engine_state import parameter_count
from cat_fast.training.tokenizer.synthetic_step import Workload

META = torch.device("meta")
BF16, FP32 = 2, 4
OPTIMIZER_BYTES = 24
"""Bytes per parameter that AdamW reads and writes in fp32: the weight and two moments."""
KINDS = ("convolution", "matrix", "attention", "memory")


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Work of a step on one rank, and its operators."""

    name: str
    dtype: str
    """Format of the trained model's products; the discriminator's are in fp32."""
    images: int
    tokens: float
    compulsory: int
    calls: Sequence[Call]
    parameters: Mapping[str, int]
    """Trained parameters by model."""

    @property
    def flops(self) -> int:
        """Operations of any implementation that computes products directly."""
        return sum(call.required for call in self.calls)

    def bound_seconds(self, sheet: DataSheet) -> tuple[float, float]:
        """Return the times at a GPU's peaks of the products and of the compulsory bytes."""
        products = sum(call.required / sheet.matrix_flops(call.dtype) for call in self.calls)
        return products, self.compulsory / sheet.bytes_per_second

    def predicted_seconds(self, sheet: DataSheet, assumed: Assumptions) -> float:
        """Return the time of the operators one after another at assumed shares of a GPU's peaks."""
        return predicted_seconds(self.calls, sheet, assumed)

    @property
    def moved(self) -> int:
        """Bytes that the operators read and write."""
        return sum(call.moved for call in self.calls)

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Return the number of operators, FLOPs and bytes by kind of work."""
        found: dict[str, Counter[str]] = {kind: Counter(calls=0, flops=0, bytes=0) for kind in KINDS}
        for call in self.calls:
            found[call.kind].update(calls=1, flops=call.flops, bytes=call.moved)
        return {kind: dict(counts) for kind, counts in found.items()}


def predicted_seconds(calls: Sequence[Call], sheet: DataSheet, assumed: Assumptions) -> float:
    """Return the time of operators one after another at assumed shares of a GPU's peaks."""
    shares = assumed.matrix_share, assumed.memory_share
    return sum(sheet.seconds(call.flops, call.moved, call.dtype, *shares) for call in calls)


def dit_step(
    name: str, config: str, lengths: Sequence[int], ranks: int, changes: Mapping[str, Any] | None = None
) -> StepWork:
    """Count a step of a diffusion transformer in bf16 on packed sequences of these lengths, by formula.

    Args:
        name: name of the result.
        config: name of a file in configs/generator.
        lengths: tokens of each sequence of the rank's batch.
        ranks: number of ranks that share the optimizer's states under ZeRO.
        changes: replaced arguments of the model.
    """
    model = transformer(config, changes)
    parameters = parameter_count(model)
    calls = [
        *transformer_calls(model, lengths, backward=True),
        _optimizer(parameters // ranks),
    ]
    return StepWork(
        name=name,
        dtype="bfloat16",
        images=len(lengths),
        tokens=sum(lengths),
        compulsory=BF16 * parameters + OPTIMIZER_BYTES * parameters // ranks,
        calls=calls,
        parameters={"transformer": parameters},
    )


def transformer(config: str, changes: Mapping[str, Any] | None = None) -> DiT:
    """Return the transformer of a file in configs/generator on the meta device, for 16 latent channels."""
    with META:
        return build_model(DiT, {"in_channels": 16, **generator_run(config).model, **(changes or {})})


def transformer_calls(model: DiT, lengths: Sequence[int], *, backward: bool) -> list[Call]:
    """Return the operators of a forward pass in bf16, and of the backward pass, by formula.

    Training is under autocast, which keeps the residual stream in fp32. Without it, weights are bf16.
    Attention is FlashAttention, which pads heads and multiplies the scores again in its backward pass.
    """
    config = model.config
    tokens, sequences, width = sum(lengths), len(lengths), config.hidden_size
    hidden, patch = int(width * config.mlp_ratio), config.patch_size**2 * config.in_channels
    square = sum(length**2 for length in lengths)
    size, stream = BF16 * tokens * width, (FP32 if backward else BF16) * tokens * width
    rows = [
        ("adaln", 2 * stream, 3 * stream),
        *[("gate_residual_adaln", 2 * stream + 2 * size, 3 * stream + 3 * size)] * (2 * config.depth),
    ]
    calls = [Call(name, 0, forward + backward * back) for name, forward, back in rows]
    modulations = 1 if config.shared_adaln else config.depth
    products = [
        *[(tokens, width, 3 * width), (tokens, width, width)] * config.depth,
        *[(tokens, width, hidden), (tokens, hidden, width)] * config.depth,
        (tokens, width, patch),
        *[(sequences, width, 6 * width)] * modulations,
        (sequences, width, 2 * width),
        (sequences, width, width),
    ]
    calls += _linear(tokens, patch, width, backward=backward, input_gradient=False)
    calls += _linear(sequences, 256, width, backward=backward, input_gradient=False)
    for product in products:
        calls += _linear(*product, backward=backward)
    head_dim = width // config.num_heads
    padded = flash_head_dim(head_dim) / head_dim

    def attention(name: str, required: int, executed: int, moved: int) -> Call:
        flops = round(padded * executed * width * square)
        return Call(name, flops, moved, "bfloat16", flops - required * width * square)

    for _ in range(config.depth):
        calls += [
            Call("gelu", 0, 2 * BF16 * tokens * hidden),
            attention("varlen_attention", 4, 4, 4 * size),
        ]
        if backward:
            calls += [
                Call("gelu_backward", 0, 3 * BF16 * tokens * hidden),
                attention("varlen_attention_backward", 8, 10, 8 * size),
            ]
    return calls


def _linear(
    rows: int, inputs: int, outputs: int, *, backward: bool, input_gradient: bool = True
) -> list[Call]:
    """Return the product of a linear layer, and those of its weight's and its input's gradients."""
    flops, moved = 2 * rows * inputs * outputs, rows * (inputs + outputs) + inputs * outputs
    count = 1 + input_gradient if backward else 0
    forward, gradient = (Call(name, flops, BF16 * moved, "bfloat16") for name in ("addmm", "mm"))
    return [forward, *[gradient] * count]


def vae_step(
    name: str, config: str, ratio: int, images: int, ranks: int, overrides: tuple[str, ...] = ()
) -> StepWork:
    """Count a step of a tokenizer after its GAN has started, without R1, at the precision of its run.

    Args:
        name: name of the result.
        config: name of a file in configs/tokenizer.
        ratio: compression ratio of the batch.
        images: number of images of the rank's batch.
        ranks: number of ranks that share the optimizer's states under ZeRO.
        overrides: `key=value` settings of the run.
    """
    counted = _count_vae(config, ratio, images, overrides)
    optimizers = [_optimizer(count // ranks) for count in counted.parameters.values() if count]
    return StepWork(
        name=name,
        dtype=counted.dtype,
        images=images,
        tokens=counted.tokens,
        compulsory=counted.weight_bytes + OPTIMIZER_BYTES * sum(counted.parameters.values()) // ranks,
        calls=[*counted.calls, *optimizers],
        parameters=counted.parameters,
    )


@dataclass(frozen=True, kw_only=True)
class _VaeCount:
    """Part of a tokenizer's step that does not depend on the number of ranks."""

    dtype: str
    tokens: float
    calls: Sequence[Call]
    parameters: Mapping[str, int]
    weight_bytes: int
    """Of trained and frozen weights, in the formats of their products."""


@cache
def _count_vae(config: str, ratio: int, images: int, overrides: tuple[str, ...]) -> _VaeCount:
    run = tokenizer_run(config, overrides)
    linear = {name: lambda *_, **__: 0 for name in ("scalar_attention", "scalar_attention_backward")}
    half = run.precision == "bf16"
    with FakeTensorMode():
        workload = Workload(run, "cpu")
        for distance in workload.objective.distances:
            distance.half = half  # as on a GPU
        batch = workload.batch(ratio, images)
        with Trace(linear) as trace:
            reconstructions = workload.reconstruct(batch)
            if workload.adversarial:
                workload.discriminate(batch, reconstructions, r1=False)
        parameters = {
            "autoencoder": parameter_count(workload.model),
            "discriminator": parameter_count(workload.discriminator) if workload.adversarial else 0,
        }
        frozen = sum(tensor.numel() for tensor in workload.frozen if isinstance(tensor, nn.Parameter))
    require_operators(trace.calls, ("group_norm_silu", "scalar_attention"))
    item = BF16 if half else FP32
    return _VaeCount(
        dtype="bfloat16" if half else "float32",
        tokens=images * prod(run.data.crop_size) / (2 * ratio) ** 2,
        calls=trace.calls,
        parameters=parameters,
        weight_bytes=item * (parameters["autoencoder"] + frozen) + FP32 * parameters["discriminator"],
    )


def _optimizer(parameters: int) -> Call:
    """Return AdamW as one pass: it reads weight, gradient and moments, and writes all but the gradient."""
    return Call("adamw", 0, (OPTIMIZER_BYTES + 4) * parameters)
