"""Figures of the gate. Names start with their kind, which has a tolerance in `expected.json`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import packing
from benchmarks.bounds.trace import Trace
from benchmarks.gate.allocations import peak_bytes
from benchmarks.shared.configs import generator_run
from benchmarks.shared.mixes import MIXES, TOKENS, UNIFORM, measure_packer
from cat_fast import NestedAutoencoderKL
from cat_fast.training.metrics.flops import DiTFlops

Figures = dict[str, float]
DIT = {"in_channels": 4, "hidden_size": 64, "depth": 2, "num_heads": 2, "class_dropout_prob": 0.0}
LENGTHS = [1024, 256, 256, 64]
VAE = {
    "sample_size": 64,
    "block_out_channels": (16, 16, 16, 16, 32, 32),
    "norm_num_groups": 8,
    "mid_block_num_layers": 1,
    "latent_channels": 4,
}
"""Toy sizes: a step takes milliseconds."""


def transformer_flops() -> Figures:
    """Return the FLOPs of training two blocks of the paper's transformer on one image of each ratio."""
    arguments = {"in_channels": 16, **generator_run("cat_xl").model, "depth": 2}
    flops = DiTFlops(arguments)
    return {
        f"flops.cat_xl_2_blocks.{part}.{ratio}x": float(value)
        for ratio, tokens in TOKENS.items()
        for part, value in flops.sequence_flops(tokens).items()
    }


def tokenizer_flops() -> Figures:
    """Return the FLOPs of encoding and decoding one image of 512 px, by tokenizer and ratio."""
    from benchmarks.efficiency.costs import multiply_accumulates

    found = {f"flops.cat_c16.{ratio}x": 2.0 * multiply_accumulates("cat_c16", ratio) for ratio in (8, 16, 32)}
    fixed = multiply_accumulates("fixed_16x_c16", 16)
    return found | {"flops.fixed_16x_c16.16x": 2.0 * fixed}


def transformer_step() -> Figures:
    """Return operators, bytes and peak memory of a packed training step."""
    model, batch = packing.build(DIT), packing.make_batch(LENGTHS, DIT)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        (model(batch.packed).sample - batch.noise).square().mean().backward()

    return _step("transformer", run)


def tokenizer_step() -> Figures:
    """Return operators, bytes and peak memory of a training step of the autoencoder, by ratio."""
    model, images = _tokenizer(), _images(2)
    found: Figures = {}
    for ratio in (8, 32):

        def run(ratio: int = ratio) -> None:
            model.zero_grad(set_to_none=True)
            _reconstruct(model, images, ratio).backward()

        found |= _step(f"tokenizer_{ratio}x", run)
    return found


def _tokenizer() -> NestedAutoencoderKL:
    torch.manual_seed(0)
    return nn.Module.to(NestedAutoencoderKL(**VAE), memory_format=torch.channels_last)


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, 64, 64).to(memory_format=torch.channels_last)


def _reconstruct(model: NestedAutoencoderKL, images: Tensor, ratio: int) -> Tensor:
    """Return a loss of the reconstructed images and the posterior."""
    reconstructed, posterior = model.reconstruct(images, ratio, sample_posterior=False)
    return reconstructed.square().mean() + posterior.kl().mean()


def packer() -> Figures:
    """Return the fill of the token budget on a few thousand lengths."""
    return {"fill.197": measure_packer(MIXES["197"], 20_000, ranks=4)["fill"]}


def packer_at_scale() -> Figures:
    """Return the fill of the token budget on a million lengths for 64 ranks, by mix."""
    mixes = {**MIXES, "uniform": UNIFORM}
    return {
        f"fill.{name}.64_ranks": measure_packer(mix, 1_000_000, ranks=64)["fill"]
        for name, mix in mixes.items()
    }


def transformer_compilation() -> Figures:
    """Return graph breaks, and graphs compiled after the first batch when lengths change."""
    compiled = torch.compile(packing.build(DIT), backend="aot_eager", dynamic=True)

    def loss(lengths: Sequence[int]) -> Tensor:
        return compiled(packing.make_batch(lengths, DIT).packed).sample.sum()

    batches = (LENGTHS, [256, 1024, 64, 64], [1024, 64], [64] * 9)
    return _graphs("transformer", [partial(loss, lengths) for lengths in batches], first=1)


def tokenizer_compilation() -> Figures:
    """Return graph breaks, and graphs compiled after the first batch of each ratio for other batch sizes."""
    compiled = torch.compile(partial(_reconstruct, _tokenizer()), backend="eager", dynamic=True)
    batches = [(_images(count), ratio) for count in (2, 3) for ratio in (8, 32)]
    return _graphs("tokenizer", [partial(compiled, *batch) for batch in batches], first=2)


def _graphs(name: str, losses: Sequence[Callable[[], Tensor]], first: int) -> Figures:
    """Return graph breaks of compiled steps, and the graphs compiled after the `first` ones."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs = []
    for loss in losses:
        loss().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    breaks = sum(counters["graph_break"].values())
    torch._dynamo.reset()
    return {
        f"graph_breaks.{name}": float(breaks),
        f"recompiles.{name}": float(graphs[-1] - graphs[first - 1]),
    }


FAST: Mapping[str, Callable[[], Figures]] = {
    "transformer_flops": transformer_flops,
    "transformer_step": transformer_step,
    "tokenizer_step": tokenizer_step,
    "packer": packer,
}
"""Seconds; also run by the tests."""
SLOW: Mapping[str, Callable[[], Figures]] = {
    "tokenizer_flops": tokenizer_flops,
    "packer_at_scale": packer_at_scale,
    "transformer_compilation": transformer_compilation,
    "tokenizer_compilation": tokenizer_compilation,
}
"""Minutes together with the compilation of the GPU kernels; run by `make bench-quick`."""


def _step(name: str, run: Callable[[], None]) -> Figures:
    """Return the figures of a step, after one that allocates what later ones reuse."""
    run()
    with Trace() as trace:
        run()
    return {
        f"functions.{name}": float(len(trace.calls)),
        f"bytes.{name}": float(sum(call.moved for call in trace.calls)),
        f"peak_bytes.{name}": float(peak_bytes(run)),
    }
