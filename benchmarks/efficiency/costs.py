"""Costs of fixed ratios and of CAT's mix, per image: encoding, decoding, training and generating.

Everything is counted on tensors without memory. Memory is the peak of the tensors that are alive at the same
time, as an allocator hook would see them, without workspaces of libraries.
"""

import gc
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bounds.data_sheets import Assumptions, DataSheet
from benchmarks.bounds.steps import BF16, CONFIGS, META, StepWork, transformer, transformer_calls
from benchmarks.bounds.trace import Trace
from cat_fast import NestedAutoencoderKL
from cat_fast.models.build import build_model
from cat_fast.training.config.load import load_run
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.tokenizer.live_bytes import LiveBytes
from cat_fast.training.tokenizer.predict_memory import trace as trace_memory
from cat_fast.training.tokenizer.synthetic_step import Workload

RATIOS = (8, 16, 32)
STEPS, PASSES = 250, 2
"""Denoising steps, and forward passes per step with classifier-free guidance."""


def tokenizer_config(ratio: int | None) -> str:
    """Return the configuration of a fixed ratio, or CAT's for None."""
    return "cat_c16" if ratio is None else f"fixed_{ratio}x_c16"


def tokenizer_parameters(config: str) -> int:
    """Return the number of parameters of a tokenizer's configuration."""
    return sum(p.numel() for p in _tokenizer(config).parameters())


def multiply_accumulates(config: str, ratio: int) -> int:
    """Return the multiply-accumulates of encoding and decoding one image at 512 px."""
    model = _tokenizer(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 512, 512, device=META), ratio)
    return counter.get_total_flops() // 2


def coding(config: str, ratio: int) -> dict[str, dict[str, Any]]:
    """Return parameters, FLOPs, bytes and peak memory of encoding and decoding one image in fp32."""
    with FakeTensorMode():
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
    run = load_run(str(CONFIGS / f"tokenizer/{config}.yaml"), [])
    assert isinstance(run, TokenizerRun)
    with FakeTensorMode():
        return max(trace_memory(Workload(run, "cpu"), ratio, images))


def generating(tokens: int, config: str = "cat_xl") -> dict[str, Any]:
    """Return FLOPs and memory of one forward pass of the transformer on one image in bf16, by formula.

    Activations peak in the MLP: the residual stream, the branch, its norm, and the hidden layer twice.
    """
    model = transformer(config)
    width, hidden = model.config.hidden_size, int(model.config.hidden_size * model.config.mlp_ratio)
    calls = transformer_calls(model, [tokens], backward=False)
    return {
        "flops": sum(call.flops for call in calls),
        "moved": sum(call.moved for call in calls),
        "peak_bytes": BF16 * tokens * (3 * width + 2 * hidden),
        "weight_bytes": BF16 * sum(p.numel() for p in model.parameters()),
        "calls": calls,
    }


def seconds(calls: Any, dtype: str, sheet: DataSheet, assumed: Assumptions) -> float:
    """Return the predicted time of operators one after another."""
    shares = assumed.matrix_share, assumed.memory_share
    return sum(sheet.seconds(call.flops, call.moved, dtype, *shares) for call in calls)


def mean_over(values: Mapping[int, float], shares: Mapping[int, float]) -> float:
    """Return the mean of figures by ratio over a mix."""
    return sum(share * values[ratio] for ratio, share in shares.items()) / sum(shares.values())


def step_milliseconds(step: StepWork, sheet: DataSheet, assumed: Assumptions) -> tuple[float, float]:
    """Return bound and prediction of a training step, in milliseconds per image."""
    bound = sheet.seconds(step.flops, step.compulsory, step.dtype)
    predicted = seconds(step.calls, step.dtype, sheet, assumed)
    return 1e3 * bound / step.images, 1e3 * predicted / step.images


def _forward(run: Callable[[], Any], model: torch.nn.Module) -> dict[str, Any]:
    linear = dict.fromkeys(("scalar_attention", "scalar_attention_triton"), lambda *_, **__: 0)
    with torch.no_grad(), Trace(linear) as trace:
        run()
    existing = list(model.parameters())
    gc.collect()
    with torch.no_grad(), LiveBytes(existing) as live:
        run()
    return {
        "flops": sum(call.flops for call in trace.calls),
        "moved": sum(call.moved for call in trace.calls),
        "peak_bytes": live.peak,
        "weight_bytes": sum(p.nbytes for p in existing),
        "calls": trace.calls,
    }


def _tokenizer(config: str) -> NestedAutoencoderKL:
    with META:
        return build_model(NestedAutoencoderKL, tokenizer_arguments(config)).eval()


def tokenizer_arguments(config: str) -> dict[str, Any]:
    """Return the arguments of a tokenizer's model."""
    run = load_run(str(CONFIGS / f"tokenizer/{config}.yaml"), [])
    assert isinstance(run, TokenizerRun)
    return dict(run.model)
