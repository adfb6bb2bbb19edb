"""Steps of training and of generation, ready to be timed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import packing
from benchmarks.shared.configs import generator_run, tokenizer_run
from cat_fast import NestedAutoencoderKL
from cat_fast.generator import SampleRequest, make_schedule
from cat_fast.generator.flops import META, forward_flops
from cat_fast.generator.sampling import denoise_step, draw_noise, prepare, scheduler_step
from cat_fast.generator.solvers import set_steps
from cat_fast.models.build import build_model
from cat_fast.training.metrics.flops import DiTFlops, TokenizerFlops, not_executed_flops, token_count
from cat_fast.training.tokenizer.synthetic_step import Workload

DEVICE = packing.DEVICE
PRECISION = "bf16" if packing.AUTOCAST else "fp32"
SIDE = 512
STEPS, GUIDANCE = 250, 1.5
"""Denoising steps per image, and the scale of classifier-free guidance, which doubles the sequences."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kind of step, ready to run."""

    run: Callable[[], object]
    images: int
    tokens: float
    flops: float
    precision: str


class TokenizerTraining:
    """Training steps of a configuration in configs/tokenizer."""

    def __init__(self, config: str, overrides: Sequence[str] = ()) -> None:
        run = self.config = tokenizer_run(config, overrides)
        torch.manual_seed(0)
        self.workload = Workload(run, DEVICE)
        allocate_states(self.workload.optimizers.values())
        self.flops = TokenizerFlops(run, self.workload.objective, self.workload.discriminator)

    def step(self, ratio: int, images: int) -> Step:
        """Set up a step on random images at one ratio."""
        batch = self.workload.batch(ratio, images)
        return Step(
            run=lambda: self.workload.step(batch),
            images=images,
            tokens=images * token_count(ratio, self.config.data.crop_size),
            flops=self.flops.of(ratio, images, self.workload.adversarial),
            precision=self.config.precision,
        )


class TransformerTraining:
    """Training steps of a configuration in configs/generator."""

    def __init__(self, config: str) -> None:
        self.arguments = transformer_arguments(config)
        self.trainer = packing.Trainer(packing.build(self.arguments))
        allocate_states([self.trainer.optimizer])
        self.flops = DiTFlops(self.arguments)

    def step(self, lengths: Sequence[int], side: int = SIDE) -> Step:
        """Set up a step on packed images of `side` pixels with these numbers of tokens."""
        batch = packing.make_batch(lengths, self.arguments, side)
        parts = list(packing.ours(batch.packed))

        def run() -> None:
            self.trainer.step(parts, batch.noise)
            self.trainer.optimizer.zero_grad(set_to_none=True)

        return Step(
            run=run,
            images=len(lengths),
            tokens=sum(lengths),
            flops=self.flops.of(lengths),
            precision=PRECISION,
        )


class Generation:
    """Denoising steps of a configuration in configs/generator with guidance, and CAT's decoder."""

    def __init__(self, config: str) -> None:
        arguments = transformer_arguments(config)
        self.transformer = packing.build(arguments).to(packing.DTYPE).eval()
        self.scheduler = set_steps(make_schedule(), "ddpm", STEPS)

    @cached_property
    def tokenizer(self) -> NestedAutoencoderKL:
        torch.manual_seed(0)
        model = cat_tokenizer().to(DEVICE, packing.DTYPE)
        return torch.nn.Module.to(model, memory_format=torch.channels_last)

    def denoise(self, lengths: Sequence[int], side: int = SIDE) -> Step:
        """Set up the first step of packed images of `side` pixels with these numbers of tokens."""
        requests = [
            SampleRequest(label=0, ratio=packing.ratio_of(n, side), grid=(s, s), seed=seed)
            for seed, n in enumerate(lengths)
            if (s := round(n**0.5))
        ]
        states = [prepare(self.transformer, one, self.scheduler, guidance=GUIDANCE) for one in requests]
        start = [state.tokens for state in states]

        def run() -> None:
            for state, tokens in zip(states, start, strict=True):
                state.tokens, state.solver.step = tokens, 0
            predictions = denoise_step(self.transformer, states)
            draw_noise(states)
            for state, prediction in zip(states, predictions, strict=True):
                scheduler_step(state, prediction)

        flops = forward_flops(self.transformer)
        return Step(
            run=run,
            images=len(lengths),
            tokens=sum(lengths),
            flops=sum(state.passes * flops.of(n) for state, n in zip(states, lengths, strict=True)),
            precision=PRECISION,
        )

    def decode(self, ratio: int) -> Step:
        """Set up the decoding of one image."""
        side = SIDE // ratio
        shape = 1, self.tokenizer.config["latent_channels"], side, side
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, packing.DTYPE)
        with META:
            counted = cat_tokenizer()

        @torch.no_grad()
        def run() -> None:
            self.tokenizer.decode(latent, ratio)

        return Step(
            run=run,
            images=1,
            tokens=token_count(ratio, SIDE),
            flops=decoder_flops(counted, latent.to(META), ratio),
            precision=PRECISION,
        )


def transformer_arguments(config: str) -> dict[str, Any]:
    """Return the arguments of a transformer that takes latents of every ratio."""
    arguments = {"in_channels": 16, **generator_run(config).model, "class_dropout_prob": 0.0}
    arguments.pop("ratios", None)
    return arguments


def cat_tokenizer() -> NestedAutoencoderKL:
    return build_model(NestedAutoencoderKL, tokenizer_run("cat_c16").model).eval()


def count_flops(run: Callable[[], object]) -> int:
    """Count the floating-point operations of a run; attention always counts as N x N products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def decoder_flops(model: NestedAutoencoderKL, latent: Tensor, ratio: int) -> int:
    """Count the floating-point operations that decoding executes, as `TokenizerFlops` does those of training.

    Attention with heads of one dimension, which torch counts as N x N products, sums at few nodes instead.
    """
    with FlopCounterMode(display=False) as counter:
        model.decode(latent, ratio)
    total = counter.get_total_flops()
    if model.config["mid_block_attention_head_dim"] != 1:
        return total
    return total - not_executed_flops(counter, latent.shape[-2] * latent.shape[-1])


def allocate_states(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Allocate the states of optimizers, so that the peak of the first step is that of any step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
