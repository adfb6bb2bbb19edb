"""Costs of fixed ratios and of CAT's mix, per image: encoding, decoding, training and generating.

Everything is counted on tensors without memory. Memory is the peak of the tensors that are alive at the same
time, as an allocator hook would see them, without workspaces of libraries.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bounds.data_sheets import DataSheet
from benchmarks.bounds.steps import (
    BF16,
    FP32,
    META,
    transformer,
    transformer_calls,
)
from benchmarks.bounds.trace import Call, Trace, require_operators
from benchmarks.shared.configs import tokenizer_run
from cat_fast import NestedAutoencoderKL
from cat_fast.generator import DiT
from cat_fast.models.build import build_model
from cat_fast.training.checkpoints.engine_state import parameter_count
from cat_fast.training.tokenizer.live_bytes import LiveBytes
from cat_fast.training.tokenizer.predict_memory import Zero
from cat_fast.training.tokenizer.predict_memory import trace as trace_memory
from cat_fast.training.tokenizer.synthetic_step import Workload

RATIOS = (8, 16, 32)
STEPS, PASSES = 250, 2
"""Denoising steps, and forward passes per step with classifier-free guidance."""


def tokenizer_config(ratio: int) -> str:
    """Return the configuration of a fixed ratio."""
    return f"fixed_{ratio}x_c16"


def tokenizer_parameters(config: str) -> int:
    """Return the number of parameters of a tokenizer's configuration."""
    return parameter_count(_tokenizer(config))


def multiply_accumulates(config: str, ratio: int) -> int:
    """Return the multiply-accumulates of encoding and decoding one image at 512 px."""
    model = _tokenizer(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 512, 512, device=META), ratio)
    return counter.get_total_flops() // 2


@cache
def coding(config: str, ratio: int, half: bool = False) -> dict[str, dict[str, Any]]:
    """Return required FLOPs, bytes and peak memory of coding one image in fp32, or in bf16 if `half`.

    Raises:
        UserError: the package's operators are not compiled, or another backend is forced.
    """
    with FakeTensorMode(), _default_dtype(torch.bfloat16 if half else torch.float32):
        model = build_model(NestedAutoencoderKL, tokenizer_arguments(config)).eval()
        side = 512 // ratio
        image, latent = (
            torch.empty(1, channels, size, size).to(memory_format=torch.channels_last)
            for channels, size in ((3, 512), (model.config["latent_channels"], side))
        )
        functions: dict[str, Callable[[], Any]] = {
            "encode": lambda: model.encode(image, ratio).latent_dist.parameters,
            "decode": lambda: model.decode(latent, ratio).sample,
        }
        return {name: _forward(function, model) for name, function in functions.items()}


@cache
def training_memory(config: str, ratio: int, images: int) -> int:
    """Return the peak bytes of a training step's tensors, without weights and optimizer states."""
    with FakeTensorMode():
        return max(trace_memory(Workload(tokenizer_run(config), "cpu"), ratio, images))


def transformer_activation_bytes(model: DiT, tokens: int, item: int = BF16, stream: int = FP32) -> int:
    """Return the bytes that all blocks keep for the backward pass on one image, by formula.

    Both norms keep the residual stream and the branch, and the linear layers their inputs; attention keeps q,
    k and v too, and GELU its input.

    Args:
        model: a diffusion transformer.
        tokens: of the image.
        item: bytes per number of branches and products.
        stream: bytes per number of the residual stream.
    """
    width = model.config.hidden_size
    hidden = int(width * model.config.mlp_ratio)
    kept = 2 * (stream + item) * width + item * (6 * width + 2 * hidden)
    return model.config.depth * tokens * kept


def training_states(autoencoder: int, discriminator: int = 0) -> int:
    """Return the bytes of weights, gradients, AdamW's moments and averaged weights on one GPU without ZeRO.

    Args:
        autoencoder: parameters of the model that is averaged: an autoencoder or a transformer.
        discriminator: parameters of a model that is trained with it.
    """
    alone = Zero(stage=0, ranks=1, bucket_bytes=0)
    trained = autoencoder + discriminator
    return sum(alone.at_rest(trained).values()) + alone.gradient_bytes(trained) + 4 * autoencoder


def forward_flops(tokens: int, config: str = "cat_xl") -> int:
    """Return the FLOPs of a forward pass of the transformer on one image."""
    calls = transformer_calls(transformer(config), [tokens], backward=False)
    return sum(call.required for call in calls)


def denoising_bytes(model: DiT, tokens: int) -> int:
    """Return the bytes of activations of a forward pass on one image in bf16, by formula.

    They peak in the MLP: the residual stream, the branch, its norm, and the hidden layer twice.
    """
    width = model.config.hidden_size
    return BF16 * tokens * (3 * width + 2 * int(width * model.config.mlp_ratio))


def bound_seconds(calls: Sequence[Call], sheet: DataSheet) -> float:
    """Return the time of the required products at a GPU's peak."""
    return sum(call.required / sheet.matrix_flops(call.dtype) for call in calls)


def mean_over(values: Mapping[int, float], shares: Mapping[int, float]) -> float:
    """Return the mean of figures by ratio over a mix."""
    return sum(share * values[ratio] for ratio, share in shares.items()) / sum(shares.values())


def _forward(run: Callable[[], Any], model: torch.nn.Module) -> dict[str, Any]:
    linear = dict.fromkeys(("scalar_attention", "scalar_attention_triton"), lambda *_, **__: 0)
    with torch.no_grad(), Trace(linear) as trace:
        run()
    require_operators(trace.calls, ("group_norm_silu", "scalar_attention"))
    existing = list(model.parameters())
    gc.collect()
    with torch.no_grad(), LiveBytes(existing) as live:
        run()
    return {
        "flops": sum(call.required for call in trace.calls),
        "peak_bytes": live.peak,
        "weight_bytes": sum(p.nbytes for p in existing),
        "calls": trace.calls,
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tokenizer(config: str) -> NestedAutoencoderKL:
    with META:
        return build_model(NestedAutoencoderKL, tokenizer_arguments(config)).eval()


def tokenizer_arguments(config: str) -> dict[str, Any]:
    """Return the arguments of a tokenizer's model."""
    return dict(tokenizer_run(config).model)
