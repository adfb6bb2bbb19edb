"""Speed of the nested VAE at the paper's size, against the same network in diffusers' blocks.

    python -m benchmarks.autoencoder --json FILE [--quick] [--only TEXT]

Keys are <reading>.<ratio>x.<encode|decode|train>.<fp32|bf16>.ratio_vs_<stock>. `heads512` is the literal
reading of the paper's attention, 512 heads of one dimension, and `heads1` one head of 512. `bf16` is
autocast; fp32 is exact, without TF32. `train` is a complete step with L1, KL and AdamW, in fp32 at 16x. Stock
models have our weights; all outputs are compared with float64 before any timing. torch.compile is measured in
channels-last, the layout that it gives convolutions anyway. Takes half an hour on two cores.
"""

import copy
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from benchmarks.shared import harness, program
from benchmarks.shared.breakdown import breakdown
from benchmarks.shared.configs import tokenizer_run
from benchmarks.shared.steps import count_flops
from benchmarks.shared.stock_autoencoder import StockAutoencoder
from cat_fast import NestedAutoencoderKL
from cat_fast.generator.flops import META
from cat_fast.hardware import run_device_type
from cat_fast.processes.signals import run_command

DEVICE = run_device_type()
READINGS = {"heads512": 1, "heads1": 512}
"""Head dimension of the mid blocks' attention."""
RATIOS = (8, 16, 32)
TRAINED_RATIO = 16
SIDE = 512
ORDERS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-4, "bf16": 0.1}
SLACK = {"fp32": 10.0, "bf16": 2.0}
TRAINING_SLACK = 50.0
"""Gradients through torch's GroupNorm have an error of 2e-3, ours of 6e-5."""
EFFORT = harness.Effort(
    min_pairs=3, max_pairs=15, seconds=10.0, longest_extra_run=20.0, longest_repeated_turn=20.0
)
"""One pass takes seconds."""
GRADIENTS = (
    "encoder.conv_in.weight",
    "encoder.mid_block.attentions.0.to_v.weight",
    "decoder.conv_out.weight",
)
"""Parameters whose gradients are compared between training steps."""


@dataclass(frozen=True)
class Work:
    """One comparison; `which` is encode, decode or train."""

    head_dim: int
    ratio: int
    which: str
    dtype: str


def build(head_dim: int, ratio: int) -> NestedAutoencoderKL:
    """Return our model of one ratio, with random weights."""
    torch.manual_seed(0)
    arguments = tokenizer_run("cat_c16").model | {"ratios": [ratio], "mid_block_attention_head_dim": head_dim}
    return NestedAutoencoderKL(**arguments).to(DEVICE).eval()


def cases(
    side: int = SIDE, make: Callable[[int, int], NestedAutoencoderKL] = build
) -> Mapping[str, Callable[[], harness.Case]]:
    """Return the cases. Stock blocks are slow at the literal reading: one layout, eager, forward."""
    table = {
        f"heads512.{ratio}x.{which}.fp32": Work(READINGS["heads512"], ratio, which, "fp32")
        for ratio in RATIOS
        for which in ("encode", "decode")
    }
    table |= {
        f"heads1.{ratio}x.{which}.{dtype}": Work(READINGS["heads1"], ratio, which, dtype)
        for ratio in RATIOS
        for which in ("encode", "decode")
        for dtype in DTYPES
    }
    table[f"heads1.{TRAINED_RATIO}x.train.fp32"] = Work(READINGS["heads1"], TRAINED_RATIO, "train", "fp32")
    return {key: partial(case, work, make, side) for key, work in table.items()}


def case(work: Work, make: Callable[[int, int], NestedAutoencoderKL], side: int) -> harness.Case:
    """Return the case of ours, channels-last and eager, against each stock variant."""
    torch._dynamo.reset()  # after eight compiled models, others would silently run eagerly
    torch.backends.cudnn.allow_tf32 = False  # on by default, with errors above the tolerance of fp32
    model = make(work.head_dim, work.ratio)
    x = make_input(work, model.config["latent_channels"], side)
    literal = work.head_dim == READINGS["heads512"]
    baselines: dict[str, harness.Contestant] = {}
    for order in ("nchw",) if literal else ORDERS:
        theirs = stock(model).to(memory_format=ORDERS[order])
        baselines[f"{order}_eager"] = contestant(theirs, theirs_of(theirs, work), work, x, order)
        if order == "channels_last":
            compiled = torch.compile(theirs_of(theirs, work), dynamic=False)
            baselines[f"{order}_compile"] = contestant(theirs, compiled, work, x, order)
    torch.nn.Module.to(model, memory_format=torch.channels_last)
    ours = contestant(model, ours_of(model, work), work, x, "channels_last")
    # no kernel executes the N x N products that are counted for heads of one dimension
    flops = None if literal else flops_of(model, work, x)
    return harness.Case(
        ours=ours,
        baselines=baselines,
        truth=lambda: truth(work, make, side),
        tolerance=TOLERANCES[work.dtype],
        slack=TRAINING_SLACK if work.which == "train" else SLACK[work.dtype],
        flops=flops,
        multiplied=DTYPES[work.dtype],
        breakdown=lambda: breakdown(ours.run),
        details={"dtype": str(DTYPES[work.dtype]).removeprefix("torch."), "device": DEVICE, "side": side},
    )


def flops_of(model: NestedAutoencoderKL, work: Work, x: Tensor) -> int:
    """Count the floating-point operations of the work, with attention as N x N products."""
    counted = torch.nn.Module.to(copy.deepcopy(model), META)
    return count_flops(contestant(counted, ours_of(counted, work), work, x.to(META), "nchw").run)


def make_input(work: Work, latent_channels: int, side: int) -> Tensor:
    """Return an image, or the latent of one."""
    small = side // work.ratio
    shape = (1, latent_channels, small, small) if work.which == "decode" else (1, 3, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def stock(model: NestedAutoencoderKL) -> StockAutoencoder:
    """Return the same network in diffusers' blocks."""
    return StockAutoencoder(model).to(DEVICE).eval()


def ours_of(model: NestedAutoencoderKL, work: Work) -> Callable[[Tensor], Tensor]:
    """Return the work as a function of its input, yielding moments, an image, or a loss."""
    if work.which == "encode":
        return lambda x: model.encode(x, work.ratio).latent_dist.parameters
    if work.which == "decode":
        return lambda z: model.decode(z, work.ratio).sample

    def loss(x: Tensor) -> Tensor:
        image, posterior = model.reconstruct(x, work.ratio, sample_posterior=False)
        return objective(x, image, posterior)

    return loss


def theirs_of(model: StockAutoencoder, work: Work) -> Callable[[Tensor], Tensor]:
    """Return the same work on the stock model."""
    if work.which != "train":
        return getattr(model, work.which)

    def loss(x: Tensor) -> Tensor:
        posterior = DiagonalGaussianDistribution(model.encode(x))
        return objective(x, model.decode(posterior.mode()), posterior)

    return loss


def objective(x: Tensor, image: Tensor, posterior: DiagonalGaussianDistribution) -> Tensor:
    return F.l1_loss(image, x) + 1e-6 * posterior.kl().mean()


def contestant(
    model: torch.nn.Module, function: Callable[[Tensor], Tensor], work: Work, x: Tensor, order: str
) -> harness.Contestant:
    """Return a forward pass without gradients, or a training step, of a model with memory format `order`."""
    x = x.to(memory_format=ORDERS[order])
    autocast = partial(torch.autocast, DEVICE, dtype=torch.bfloat16, enabled=work.dtype == "bf16")
    if work.which != "train":

        def run() -> Tensor:
            with torch.no_grad(), autocast():
                return function(x)

        return harness.Contestant(run=run, outputs=lambda y: (y,))

    # With a learning rate of zero, a step does all its work and leaves the weights unchanged for the next
    # turn.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = function(x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return harness.Contestant(run=step, outputs=lambda loss: (loss, *gradients(model)))


def gradients(model: torch.nn.Module) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    return [parameter.grad for name in GRADIENTS if (parameter := parameters[name]).grad is not None]


def truth(work: Work, make: Callable[[int, int], NestedAutoencoderKL], side: int) -> Sequence[Tensor]:
    """Return the stock model's outputs in float64, computed once for both dtypes."""
    return _truth(Work(work.head_dim, work.ratio, work.which, "fp32"), make, side)


@functools.cache
def _truth(work: Work, make: Callable[[int, int], NestedAutoencoderKL], side: int) -> Sequence[Tensor]:
    model = make(work.head_dim, work.ratio)
    exact = stock(model).double()
    x = make_input(work, model.config["latent_channels"], side).double()
    reference = contestant(exact, theirs_of(exact, work), work, x, "nchw")
    return tuple(output.clone() for output in reference.outputs(reference.run()))


if __name__ == "__main__":
    sys.exit(run_command(lambda: program.main("autoencoder", cases(), full=EFFORT)))
