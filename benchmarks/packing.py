"""Training steps of the DiT on packed images of mixed ratios, against other ways to batch them.

    python -m benchmarks.packing --json FILE [--quick] [--only TEXT]

Keys are <mix>.ratio_vs_<rival>: how many times as many images a second ours trains on, at the width of
DiT-B/2, two layers deep, with AdamW. The mixes are the paper's, by their mean number of tokens; a batch holds
MAX_TOKENS. Of the rivals, `padded`, `dense_mask` and `bucketed` train on the same images, `fixed16` on as
many tokens of images at 16x. All are this package's DiT with another attention, and must first compute what
it does in float64 on one image after another. The file also says what an image costs by FLOPs
(`flops_per_image`), and how well the packer fills and balances batches and how fast (`packer`). Half an hour
on two cores; `--quick`, with a quarter of the budget, one mix, and correctness on a smaller batch, a minute.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.shared import baselines, harness, image_flops, program
from benchmarks.shared.mixes import MAX_TOKENS, MIXES, UNIFORM, milliseconds_a_step, packed
from cat_fast.generator import DiT
from cat_fast.kernels.varlen_attention.reference import varlen_attention_reference
from cat_fast.packing import PackedSequence
from cat_fast.training.metrics.flops import GeneratorFlops
from cat_fast.training.runtime.host_memory import keep_freed_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AUTOCAST = DEVICE == "cuda"
DTYPE = torch.bfloat16 if AUTOCAST else torch.float32
MODEL = {"in_channels": 16, "hidden_size": 768, "depth": 2, "num_heads": 12, "class_dropout_prob": 0.0}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
EFFORT = harness.Effort(least_pairs=3, most_pairs=15, seconds=10.0)
"""A step takes seconds."""
RATIO_OF_LENGTH = {1024: 8, 256: 16, 64: 32}
GRADIENTS = ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.linear.weight")
"""Those that steps are compared by."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention within each sequence: q, k, v (T, H, D) -> (T, H, D)."""


class Part(NamedTuple):
    """What one forward and backward pass is given of a batch."""

    packed: PackedSequence
    attend: Attend | None
    """None is the model's own."""
    real: Tensor | slice
    """Its tokens that are no padding."""
    rows: Tensor | slice
    """Which tokens of the batch those are."""


@dataclass(frozen=True)
class Batch:
    """Noisy latents and the noise (T, C) that a step learns to predict."""

    packed: PackedSequence
    noise: Tensor


def ours(batch: PackedSequence) -> Iterator[Part]:
    yield Part(batch, None, slice(None), slice(None))


def alone(batch: PackedSequence) -> Iterator[Part]:
    """The contract: attention runs once for each image."""
    lengths = batch.cu_seqlens.diff().tolist()
    attend = partial(baselines.sdpa_per_sequence, lengths=lengths)
    yield Part(batch, attend, slice(None), slice(None))


def dense_mask(batch: PackedSequence) -> Iterator[Part]:
    """The naive way to pack: one sequence, under a mask that keeps images apart."""
    owner = batch.sequence_index()
    attend = partial(baselines.block_mask_sdpa, mask=owner[:, None] == owner[None, :])
    yield Part(batch, attend, slice(None), slice(None))


def padded(batch: PackedSequence) -> Iterator[Part]:
    """All images as long as the longest, under a mask that hides the padding.

    Padding is packed behind its image as a sequence of its own, so that the model gives the tokens of the
    image the places they have.
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

    # numbers, not a mask, whose size a GPU would have to stop for
    yield Part(PackedSequence.concat(rows), attend, real.flatten().nonzero().flatten(), slice(None))


def bucketed(batch: PackedSequence) -> Iterator[Part]:
    """One dense batch a ratio, one pass after another, and one step of the optimizer."""
    images, owner = batch.split(), batch.sequence_index()
    for ratio in batch.ratio.unique():
        members = (batch.ratio == ratio).nonzero().flatten()
        dense = PackedSequence.concat([images[i] for i in members.tolist()])
        attend = partial(varlen_attention_reference, cu_seqlens=dense.cu_seqlens.cpu())  # one SDPA call
        yield Part(dense, attend, slice(None), torch.isin(owner, members).nonzero().flatten())


class OtherAttention(nn.Module):
    """The DiT's self-attention with its weights and another way to attend."""

    def __init__(self, own: Any, attend: Attend) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = own.qkv, own.proj, own.num_heads
        self.attend: Attend = attend

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
        return self.proj(self.attend(q, k, v).flatten(1))


class Trainer:
    """A model and its optimizer, which all contestants share.

    At a rate of zero a step does all its work and leaves the weights as they are, for the next turn.
    """

    def __init__(self, model: DiT) -> None:
        self.model = model
        self.own = [block.attn for block in model.blocks]
        self.compared = [model.get_parameter(name) for name in GRADIENTS]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(self, parts: Sequence[Part], noise: Tensor) -> list[tuple[Tensor | slice, Tensor]]:
        """Forward and backward of all parts and one step; what was predicted, and for which tokens."""
        self.optimizer.zero_grad(set_to_none=True)
        told = []
        for part in parts:
            self._attend_by(part.attend)
            with torch.autocast(DEVICE, dtype=DTYPE, enabled=AUTOCAST):
                predicted = self.model(part.packed).sample[part.real]
            errors = predicted.to(noise.dtype) - noise[part.rows]
            (errors.square().sum() / noise.numel()).backward()
            told.append((part.rows, predicted.detach()))
        self.optimizer.step()
        self._attend_by(None)
        return told

    def _attend_by(self, attend: Attend | None) -> None:
        for block, own in zip(self.model.blocks, self.own, strict=True):
            block.attn = own if attend is None else OtherAttention(own, attend)

    def outputs(self, told: Sequence[tuple[Tensor | slice, Tensor]]) -> list[Tensor]:
        """The prediction (T, C) in the order of the batch, and the gradients that are compared."""
        _, first = told[0]
        predicted = first.new_empty(sum(len(part) for _, part in told), first.shape[1])
        for rows, part in told:
            predicted[rows] = part
        return [predicted, *(parameter.grad for parameter in self.compared if parameter.grad is not None)]


def build(arguments: Mapping[str, Any]) -> DiT:
    """With random weights where the DiT starts at zero and would predict nothing, whatever attention does."""
    torch.manual_seed(0)
    model = DiT(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model.to(DEVICE)


def composed(mix: Mapping[int, float], max_tokens: int) -> list[int]:
    """Lengths that fill `max_tokens` to the last, above all with the mix's mean, and near its shares."""
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


def drawn(lengths: Sequence[int], arguments: Mapping[str, Any]) -> Batch:
    """Square images of so many tokens each, with random content."""
    generator = torch.Generator().manual_seed(2)
    sides = [2 * round(length**0.5) for length in lengths]
    latents = [torch.randn(arguments["in_channels"], side, side, generator=generator) for side in sides]
    batch = PackedSequence.from_latents(
        latents,
        [RATIO_OF_LENGTH[length] for length in lengths],
        labels=torch.randint(1000, (len(lengths),), generator=generator),
    )
    timestep = torch.randint(1000, (len(batch),), generator=generator)
    noise = torch.randn(batch.tokens.shape, generator=generator)
    return Batch(batch.replace(timestep=timestep).to(DEVICE), noise.to(DEVICE))


def case(
    mix: Mapping[int, float], max_tokens: int, checked_tokens: int, arguments: Mapping[str, Any] = MODEL
) -> harness.Case:
    """Ours against all rivals; correctness is checked on a batch of `checked_tokens`."""
    trainer = Trainer(build(arguments))
    fixed = [256] * (max_tokens // 256)
    lengths = composed(mix, max_tokens)
    batches = {tokens: drawn(composed(mix, tokens), arguments) for tokens in {max_tokens, checked_tokens}}
    of_fixed = {tokens: drawn([256] * (tokens // 256), arguments) for tokens in {max_tokens, checked_tokens}}

    def contestant(
        way: Callable[[PackedSequence], Iterator[Part]], given: Mapping[int, Batch], **more: Any
    ) -> harness.Contestant:
        steps = {
            tokens: partial(trainer.step, list(way(batch.packed)), batch.noise)
            for tokens, batch in given.items()
        }
        return harness.Contestant(
            run=steps[max_tokens],
            rehearsal=steps[checked_tokens],
            outputs=trainer.outputs,
            count=len(given[max_tokens].packed),
            **more,
        )

    def truth(batch: Batch) -> list[Tensor]:
        exact = Trainer(copy.deepcopy(trainer.model).double())
        doubled = batch.packed.to(dtype=torch.float64)
        return exact.outputs(exact.step(list(alone(doubled)), batch.noise.double()))

    flops = GeneratorFlops(dict(arguments))
    return harness.Case(
        ours=contestant(ours, batches),
        baselines={
            **{way.__name__: contestant(way, batches) for way in (padded, dense_mask, bucketed)},
            "fixed16": contestant(ours, of_fixed, truth=lambda: truth(of_fixed[checked_tokens])),
        },
        truth=lambda: truth(batches[checked_tokens]),
        tolerance=TOLERANCES[DTYPE],
        expected={"fixed16": flops.of(fixed) / len(fixed) / (flops.of(lengths) / len(lengths))},
        rates={"tokens": sum(lengths), "images": len(lengths)},
        flops=flops.of(lengths),
        multiplied=DTYPE,
        details={
            "dtype": str(DTYPE).removeprefix("torch."),
            "device": DEVICE,
            "max_tokens": max_tokens,
            "checked_tokens": checked_tokens,
            "images": {f"{RATIO_OF_LENGTH[n]}x": lengths.count(n) for n in mix},
        },
    )


def cases(
    max_tokens: int, checked_tokens: int, mixes: Sequence[str]
) -> dict[str, Callable[[], harness.Case]]:
    """What the harness measures, by mix."""
    return {mix: partial(case, MIXES[mix], max_tokens, checked_tokens) for mix in mixes}


def facts() -> dict[str, Any]:
    """What takes no training: FLOPs an image, and the packer."""
    found = image_flops.of_presets()
    filled = {name: packed(mix, 1_000_000, ranks=64) for name, mix in {**MIXES, "uniform": UNIFORM}.items()}
    planned = {ranks: milliseconds_a_step(MIXES["197"], ranks) for ranks in (1, 16, 64, 1024)}
    for line in image_flops.lines(found):
        print(line)
    for name, one in filled.items():
        print(
            f"packer, mix {name}, 64 ranks: {one['fill']:.2%} full; sum(n^2) spreads {one['spread']:.2%} "
            f"(dealt in turn {one['spread_dealt_in_turn']:.1%}); a million lengths in {one['seconds']:.2f} s"
        )
    for ranks, milliseconds in planned.items():
        print(f"planning a step for {ranks} ranks takes each {milliseconds:.2f} ms")
    return {
        "flops_per_image": {"presets": found, "published": image_flops.PUBLISHED},
        "packer": {"max_tokens": MAX_TOKENS, "mixes": filled, "milliseconds_a_step_by_ranks": planned},
    }


if __name__ == "__main__":
    if DEVICE == "cpu":  # as in a training
        keep_freed_memory()
    sys.exit(
        program.main(
            "packing",
            cases(MAX_TOKENS, MAX_TOKENS, list(MIXES)),
            full=EFFORT,
            quick_cases=cases(MAX_TOKENS // 4, 1344, ["252"]),
            facts=facts,
        )
    )
