"""Training steps of the DiT on packed images of mixed ratios, against other ways to batch them.

    python -m benchmarks.packing --json FILE [--quick] [--only TEXT]

Keys are <mix>.ratio_vs_<baseline>: our images per second relative to the baseline's, at the width of DiT-B/2,
two layers deep, with AdamW. The mixes are the paper's, named by their mean number of tokens; a batch holds
MAX_TOKENS. The baselines `padded`, `bucketed` and `dense_mask` train on the same images, `fixed16` on the
same number of tokens of images at 16x; `dense_mask`, whose time depends on no mix, is measured with the first
one. All are this package's DiT with another attention, and must first agree with float64 computed on one
image after another. The file also contains FLOPs per image (`flops_per_image`) and the fill, balance and
speed of the packer (`packer`). Takes a quarter of an hour on two cores; `--quick` takes a minute, with a
quarter of the budget, one mix, and correctness on a smaller batch.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.shared import baselines, harness, image_flops, program
from benchmarks.shared.mixes import MAX_TOKENS, MIXES, UNIFORM, measure_packer, milliseconds_per_step
from cat_fast.generator import DiT
from cat_fast.hardware import run_device_type
from cat_fast.kernels.varlen_attention.reference import varlen_attention_reference
from cat_fast.packing import PackedSequence
from cat_fast.processes.malloc import keep_freed_memory
from cat_fast.processes.signals import run_command
from cat_fast.training.metrics.flops import DiTFlops

DEVICE = run_device_type()
AUTOCAST = DEVICE == "cuda"
DTYPE = torch.bfloat16 if AUTOCAST else torch.float32
MODEL = {"in_channels": 16, "hidden_size": 768, "depth": 2, "num_heads": 12, "class_dropout_prob": 0.0}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
EFFORT = harness.Effort(
    min_pairs=3, max_pairs=15, seconds=10.0, longest_extra_run=10.0, longest_repeated_turn=20.0
)
"""One step takes seconds."""
GRADIENTS = ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.linear.weight")
"""Parameters whose gradients are compared between steps."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention within each sequence: q, k, v (T, H, D) -> (T, H, D)."""


class Part(NamedTuple):
    """The input of one forward and backward pass, a part of a batch."""

    packed: PackedSequence
    attend: Attend | None
    """None for the model's own attention."""
    real: Tensor | slice
    """Its tokens other than padding."""
    rows: Tensor | slice
    """Positions of these tokens in the batch."""


@dataclass(frozen=True)
class Batch:
    """Noisy latents and the noise (T, C) that a step learns to predict."""

    packed: PackedSequence
    noise: Tensor


def ours(batch: PackedSequence) -> Iterator[Part]:
    yield Part(batch, None, slice(None), slice(None))


def alone(batch: PackedSequence) -> Iterator[Part]:
    """Yield the reference: attention runs once per image."""
    lengths = batch.cu_seqlens.diff().tolist()
    attend = partial(baselines.sdpa_per_sequence, lengths=lengths)
    yield Part(batch, attend, slice(None), slice(None))


def dense_mask(batch: PackedSequence) -> Iterator[Part]:
    """Yield naive packing: one sequence with a mask that separates images."""
    owner = batch.sequence_index()
    attend = partial(baselines.block_mask_sdpa, mask=owner[:, None] == owner[None, :])
    yield Part(batch, attend, slice(None), slice(None))


def padded(batch: PackedSequence) -> Iterator[Part]:
    """Yield all images padded to the longest, with a mask that hides the padding.

    Padding follows its image as a sequence of its own, so that the model assigns the image's tokens their
    positions.
    """
    rows: list[PackedSequence] = []
    for one in batch.split():
        rows.append(one)
        if missing := batch.max_seqlen - one.num_tokens:
            rows.append(
                one.replace(
                    tokens=one.tokens.new_zeros(missing, one.tokens.shape[1]),
                    cu_seqlens=one.cu_seqlens.new_tensor([0, missing]),
                    grid=one.grid.new_tensor([[1, missing]]),
                )
            )
    places = torch.arange(batch.max_seqlen, device=batch.device)
    real = places < batch.cu_seqlens.diff()[:, None]

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, real.shape) for x in qkv)
        return baselines.padded_sdpa(q, k, v, real).flatten(0, 1)

    # indices, since the size of a masked result would synchronize a GPU
    yield Part(PackedSequence.concat(rows), attend, real.flatten().nonzero().flatten(), slice(None))


def bucketed(batch: PackedSequence) -> Iterator[Part]:
    """Yield one dense batch per ratio: one pass each, and one optimizer step."""
    images, owner = batch.split(), batch.sequence_index()
    for ratio in batch.ratio.unique():
        members = (batch.ratio == ratio).nonzero().flatten()
        dense = PackedSequence.concat([images[i] for i in members.tolist()])
        attend = partial(varlen_attention_reference, cu_seqlens=dense.cu_seqlens.cpu())  # one SDPA call
        yield Part(dense, attend, slice(None), torch.isin(owner, members).nonzero().flatten())


Way = Callable[[PackedSequence], Iterator[Part]]
WAYS: tuple[Way, ...] = (padded, bucketed, dense_mask)
"""Baselines on the same images."""


class OtherAttention(nn.Module):
    """The DiT's self-attention with its weights and another attention function."""

    def __init__(self, own: Any, attend: Attend) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = own.qkv, own.proj, own.num_heads
        self.attend: Attend = attend

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
        return self.proj(self.attend(q, k, v).flatten(1))


class Trainer:
    """A model and its optimizer, shared by all contestants.

    With a learning rate of zero, a step does all its work and leaves the weights unchanged for the next turn.
    """

    def __init__(self, model: DiT) -> None:
        self.model = model
        self.own = [block.attn for block in model.blocks]
        self.compared = [model.get_parameter(name) for name in GRADIENTS]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(self, parts: Sequence[Part], noise: Tensor) -> list[tuple[Tensor | slice, Tensor]]:
        """Forward and backward of all parts and one step; what was predicted, and for which tokens."""
        self.optimizer.zero_grad(set_to_none=True)
        results = []
        for part in parts:
            self._attend_by(part.attend)
            with torch.autocast(DEVICE, dtype=DTYPE, enabled=AUTOCAST):
                predicted = self.model(part.packed).sample[part.real]
            errors = predicted.to(noise.dtype) - noise[part.rows]
            (errors.square().sum() / noise.numel()).backward()
            results.append((part.rows, predicted.detach()))
        self.optimizer.step()
        self._attend_by(None)
        return results

    def _attend_by(self, attend: Attend | None) -> None:
        for block, own in zip(self.model.blocks, self.own, strict=True):
            block.attn = own if attend is None else OtherAttention(own, attend)

    def outputs(self, results: Sequence[tuple[Tensor | slice, Tensor]]) -> list[Tensor]:
        """Return the prediction (T, C) in the order of the batch, and the gradients to compare."""
        _, first = results[0]
        predicted = first.new_empty(sum(len(part) for _, part in results), first.shape[1])
        for rows, part in results:
            predicted[rows] = part
        return [predicted, *(parameter.grad for parameter in self.compared if parameter.grad is not None)]


def build(arguments: Mapping[str, Any]) -> DiT:
    """Return a DiT with random weights where it starts at zero, so that attention affects the output."""
    torch.manual_seed(0)
    model = DiT(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model.to(DEVICE)


def compose_lengths(mix: Mapping[int, float], max_tokens: int) -> list[int]:
    """Return lengths that fill `max_tokens` exactly, first matching the mix's mean and then its shares."""
    longest, middle, shortest = mix
    mean = sum(length * share for length, share in mix.items())

    def off(counts: tuple[int, int, int]) -> float:
        shares = [abs(count / sum(counts) - share) for count, share in zip(counts, mix.values(), strict=True)]
        return 10 * abs(max_tokens / sum(counts) / mean - 1) + sum(shares)

    candidates = [
        (a, b, left // shortest)
        for a in range(1, max_tokens // longest + 1)
        for b in range(1, max_tokens // middle + 1)
        if (left := max_tokens - a * longest - b * middle) >= shortest
    ]
    counts = min(candidates, key=off)
    lengths = [length for length, count in zip(mix, counts, strict=True) for _ in range(count)]
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1))
    return [lengths[i] for i in order.tolist()]


def ratio_of(tokens: int, side: int = 512) -> int:
    """Return the ratio at which a square image of `side` pixels has this number of tokens."""
    return side // (2 * round(tokens**0.5))


def make_batch(lengths: Sequence[int], arguments: Mapping[str, Any], side: int = 512) -> Batch:
    """Return images of `side` pixels with these numbers of tokens and random content."""
    generator = torch.Generator().manual_seed(2)
    ratios = [ratio_of(length, side) for length in lengths]
    shapes = [(arguments["in_channels"], side // ratio, side // ratio) for ratio in ratios]
    latents = [torch.randn(shape, generator=generator) for shape in shapes]
    batch = PackedSequence.from_latents(
        latents,
        ratios,
        labels=torch.randint(1000, (len(lengths),), generator=generator),
    )
    timestep = torch.randint(1000, (len(batch),), generator=generator)
    noise = torch.randn(batch.tokens.shape, generator=generator)
    return Batch(batch.replace(timestep=timestep).to(DEVICE), noise.to(DEVICE))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The parts that all mixes share: the model, the sizes of batches, and the baseline at 16x."""

    arguments: Mapping[str, Any]
    """Of the model."""
    max_tokens: int
    checked_tokens: int
    """Tokens of the batches on which correctness is checked."""

    @cached_property
    def trainer(self) -> Trainer:
        return Trainer(build(self.arguments))

    def batches(self, compose: Callable[[int], list[int]]) -> dict[int, Batch]:
        """Return batches of `max_tokens` and `checked_tokens`; `compose` returns lengths from their sum."""
        sizes = {self.max_tokens, self.checked_tokens}
        return {tokens: make_batch(compose(tokens), self.arguments) for tokens in sizes}

    @cached_property
    def fixed(self) -> dict[int, Batch]:
        """Batches of images at 16x."""
        return self.batches(lambda tokens: [256] * (tokens // 256))

    @cached_property
    def fixed_truth(self) -> list[Tensor]:
        return self.truth(self.fixed)

    def truth(self, batches: Mapping[int, Batch]) -> list[Tensor]:
        """Return the outputs in float64 on the batch of `checked_tokens`."""
        batch = batches[self.checked_tokens]
        exact = Trainer(copy.deepcopy(self.trainer.model).double())
        doubled = batch.packed.to(dtype=torch.float64)
        return exact.outputs(exact.step(list(alone(doubled)), batch.noise.double()))

    def contestant(self, way: Way, batches: Mapping[int, Batch], **more: Any) -> harness.Contestant:
        """Return the training on batches, one of the ways to batch them."""
        steps = {
            tokens: partial(self.trainer.step, list(way(batch.packed)), batch.noise)
            for tokens, batch in batches.items()
        }
        return harness.Contestant(
            run=steps[self.max_tokens],
            rehearsal=steps[self.checked_tokens],
            outputs=self.trainer.outputs,
            count=len(batches[self.max_tokens].packed),
            **more,
        )


def case(setting: Setting, mix: Mapping[int, float], ways: Sequence[Way]) -> harness.Case:
    """Return the case of ours against other ways to batch the same images, and against images at 16x."""
    batches = setting.batches(partial(compose_lengths, mix))
    lengths = compose_lengths(mix, setting.max_tokens)
    flops = DiTFlops(dict(setting.arguments))
    return harness.Case(
        ours=setting.contestant(ours, batches),
        baselines={
            **{way.__name__: setting.contestant(way, batches) for way in ways},
            "fixed16": setting.contestant(ours, setting.fixed, truth=lambda: setting.fixed_truth),
        },
        truth=lambda: setting.truth(batches),
        tolerance=TOLERANCES[DTYPE],
        expected={"fixed16": flops.of([256]) / (flops.of(lengths) / len(lengths))},
        rates={"tokens": sum(lengths), "images": len(lengths)},
        flops=flops.of(lengths),
        multiplied=DTYPE,
        details={
            "dtype": str(DTYPE).removeprefix("torch."),
            "device": DEVICE,
            "max_tokens": setting.max_tokens,
            "checked_tokens": setting.checked_tokens,
            "images": {f"{ratio_of(n)}x": lengths.count(n) for n in mix},
        },
    )


def cases(
    max_tokens: int, checked_tokens: int, mixes: Sequence[str], arguments: Mapping[str, Any] = MODEL
) -> dict[str, Callable[[], harness.Case]]:
    """Return the cases to measure, by mix; `dense_mask` in the first one only, as it depends on no mix."""
    setting = Setting(arguments=arguments, max_tokens=max_tokens, checked_tokens=checked_tokens)
    return {mix: partial(case, setting, MIXES[mix], WAYS if mix == mixes[0] else WAYS[:-1]) for mix in mixes}


def facts() -> dict[str, Any]:
    """Compute the results that need no training: FLOPs per image, and the packer."""
    found = image_flops.count_presets()
    filled = {
        name: measure_packer(mix, 1_000_000, ranks=64) for name, mix in {**MIXES, "uniform": UNIFORM}.items()
    }
    planned = {ranks: milliseconds_per_step(MIXES["197"], ranks) for ranks in (1, 16, 64, 1024)}
    for line in image_flops.lines(found):
        print(line)
    for name, one in filled.items():
        print(
            f"packer, mix {name}, 64 ranks: {one['fill']:.2%} full; sum(n^2) spreads {one['spread']:.2%} "
            f"(assigned in turn {one['spread_in_turn']:.1%}); a million lengths in {one['seconds']:.2f} s"
        )
    for ranks, milliseconds in planned.items():
        print(f"planning a step for {ranks} ranks takes {milliseconds:.2f} ms per rank")
    return {
        "flops_per_image": {"presets": found, "published": image_flops.PUBLISHED},
        "packer": {"max_tokens": MAX_TOKENS, "mixes": filled, "milliseconds_per_step_by_ranks": planned},
    }


def main() -> int:
    if DEVICE == "cpu":  # as in training
        keep_freed_memory()
    return program.main(
        "packing",
        cases(MAX_TOKENS, MAX_TOKENS, list(MIXES)),
        full=EFFORT,
        quick_cases=cases(MAX_TOKENS // 4, 1344, ["252"]),
        facts=facts,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
