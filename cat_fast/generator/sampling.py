"""Sampling of packed sequences, one stage at a time: `prepare`, `denoise_step` and `scheduler_step`.

    states = [prepare(model, request, set_steps(schedule, "ddim", 30)) for request in requests]
    while not states[0].finished:
        for state, prediction in zip(states, denoise_step(model, states), strict=True):
            scheduler_step(state, prediction)

Images of one step may differ in ratio, size, timestep, scheduler, guidance and text. With `rows` set to a
block that the machine's matrix products are invariant to, an image's bits do not depend on the others of its
steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cat_fast.errors import UserError
from cat_fast.generator.diffusion import check_betas
from cat_fast.generator.dit import DiT
from cat_fast.generator.noise import CounterNoise
from cat_fast.generator.packed_text import PackedText
from cat_fast.generator.solvers import Solver
from cat_fast.integers import store_integers
from cat_fast.kernels.pack.op import pack, unpack
from cat_fast.packing import PackedSequence
from cat_fast.packing.transfer import copy_together

Guidance = float | Mapping[int, float]
"""Scale of classifier-free guidance; 1 disables it. A mapping has one scale per ratio."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Label, latent shape and seed of one image to sample."""

    label: int
    """Class index; `num_classes` is the null class."""
    ratio: int
    """Compression ratio of the latent."""
    grid: tuple[int, int]
    """Height and width of the latent in tokens."""
    seed: int
    """Seed of all random numbers of this image."""
    text: str = ""
    """Caption, for a model with text; empty is the null text."""

    def __post_init__(self) -> None:
        store_integers(self, "label", "ratio", "seed")

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(kw_only=True, eq=False)
class SamplingState:
    """One image between two steps."""

    request: SampleRequest
    tokens: torch.Tensor
    """(n, C) float32, noisy."""
    solver: Solver
    guidance: float
    guidance_channels: int | None
    text: torch.Tensor | None
    """(L, text_dim) encoded text, without tokens for the null text; None for a model without text."""

    @property
    def finished(self) -> bool:
        return self.solver.step >= self.solver.num_steps

    @property
    def passes(self) -> int:
        """Number of sequences per step: 2 with the unconditional twin of guidance, else 1."""
        return passes_of(self.guidance)

    def latent(self, patch_size: int, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Return the latent (c, h, w) of the current tokens, or of other tokens (n, C)."""
        return unpack(self.tokens if tokens is None else tokens, [self.request.grid], patch_size)[0]


def passes_of(guidance: float) -> int:
    """Return the number of sequences of an image per step: 2 with guidance, 1 if it is disabled."""
    return 1 if guidance == 1 else 2


def prepare(
    model: DiT,
    request: SampleRequest,
    scheduler: Any,
    *,
    guidance: float = 1.5,
    guidance_channels: int | None = None,
    text: torch.Tensor | None = None,
    noise: CounterNoise | None = None,
    device: torch.device | None = None,
) -> SamplingState:
    """Return the state of one image before its first step.

    Args:
        model: transformer in evaluation mode; in training mode it would drop labels.
        request: label, latent shape and seed.
        scheduler: with timesteps set, from `set_steps`.
        guidance: scale of classifier-free guidance, eps_null + guidance * (eps_label - eps_null); 1 disables
            it, any other value adds an unconditional twin of the sequence to every step.
        guidance_channels: number of leading latent channels to guide, None for all. The others keep the
            conditional prediction. The original DiT guides 3 of 4.
        text: (L, text_dim) encoded text, for a model with text; None is the null text.
        noise: source of noise, instead of that of `request.seed`.
        device: device of the computation; default `model.device`, which differs for an offloaded model.

    Raises:
        UserError: the model is in training mode, it was trained with other betas than those of the scheduler,
            or it does not have as many channels to guide.
    """
    if model.training:
        raise UserError(
            "model: expected evaluation mode, got training mode, which drops labels; call model.eval()"
        )
    check_betas(model, scheduler)
    check_guidance_channels(guidance_channels, model.config.in_channels)
    config, device = model.config, device or model.device
    noise = noise or CounterNoise.from_seed(request.seed)
    height, width = (config.patch_size * side for side in request.grid)
    tokens = pack([noise.normal(0, (config.in_channels, height, width))], config.patch_size)
    if text is None and config.text_dim is not None:
        text = torch.empty(0, config.text_dim, dtype=model.dtype)
    return SamplingState(
        request=request,
        tokens=tokens.to(device, non_blocking=True),
        solver=Solver(scheduler, noise, shift=_shift(model, request)),
        guidance=guidance,
        guidance_channels=guidance_channels,
        text=None if text is None else text.to(device, non_blocking=True),
    )


def _shift(model: DiT, request: SampleRequest) -> float | None:
    """Return the shift of a flow's noise levels for the length of an image, as in training; None for none."""
    shift_tokens = getattr(model.config, "noise_shift_tokens", None)
    return None if shift_tokens is None else math.sqrt(request.num_tokens / shift_tokens)


def check_guidance_channels(count: int | None, in_channels: int) -> None:
    """Check the number of latent channels to guide; raise UserError if the model does not have as many."""
    if count is not None and not 1 <= count <= in_channels:
        raise UserError(
            f"guidance_channels: expected 1 .. {in_channels}, the number of latent channels, got {count}"
        )


def guidance_scales(guidance: Guidance, ratios: Sequence[int]) -> list[float]:
    """Return the guidance scale of each ratio in a list.

    Raises:
        UserError: a mapping lacks a ratio, or a scale is not finite.
    """
    if isinstance(guidance, Mapping) and (missing := {*ratios} - {*guidance}):
        raise UserError(f"guidance: expected a scale for {min(missing)}x, got {dict(guidance)}")
    scales = [guidance[ratio] if isinstance(guidance, Mapping) else guidance for ratio in ratios]
    for scale in scales:
        if not abs(scale) <= torch.finfo(torch.float32).max:
            raise UserError(f"guidance_scale {scale}: expected a finite number, such as 1.5")
    return scales


@torch.no_grad()
def denoise_step(model: DiT, states: Sequence[SamplingState], *, rows: int = 1) -> list[torch.Tensor]:
    """Predict the noise (n, C), float32, of every state in one forward pass, with guidance.

    Args:
        model: transformer in evaluation mode.
        states: none of them finished.
        rows: sequences, tokens and text tokens are filled up to multiples of this with null sequences.
    """
    step = pack_step(model, states, rows)
    predicted = model(step.packed, text=step.text, return_dict=False)[0].float()
    return [
        _guide(state, [predicted[part] for part in parts], model.config.in_channels)
        for state, parts in zip(states, step.parts, strict=True)
    ]


def scheduler_step(state: SamplingState, prediction: torch.Tensor) -> None:
    """Advance a state by one step from the guided prediction (n, C)."""
    state.tokens = state.solver.advance(prediction, state.tokens)


class StepPack(NamedTuple):
    """Input of one forward pass."""

    packed: PackedSequence
    text: PackedText | None
    parts: list[list[slice]]
    """Tokens of each state: its conditional sequence and, with guidance, the unconditional one."""


class _Row(NamedTuple):
    """One sequence of a pack."""

    tokens: torch.Tensor
    grid: tuple[int, int]
    ratio: int
    label: int
    timestep: float
    text: torch.Tensor | None


def pack_step(model: DiT, states: Sequence[SamplingState], rows: int = 1) -> StepPack:
    """Pack the sequences of one step, each with its own timestep, label, ratio, size and text.

    Sequences of equal length are adjacent. `max_seqlen` is the longest sequence, which is known on the host.
    """
    null_class = model.config.num_classes
    sequences: list[_Row] = []
    parts: list[list[slice]] = [[] for _ in states]
    total = 0
    for i in sorted(range(len(states)), key=lambda i: states[i].request.num_tokens):
        state, request = states[i], states[i].request
        timestep, null_text = float(state.solver.timestep), None if state.text is None else state.text[:0]
        twins = ((request.label, state.text), (null_class, null_text))[: state.passes]
        for label, text in twins:
            sequences.append(_Row(state.tokens, request.grid, request.ratio, label, timestep, text))
            parts[i].append(slice(total, total + request.num_tokens))
            total += request.num_tokens
    sequences += _filling(sequences, total, null_class, rows)
    return StepPack(*_join(sequences), parts)


def _filling(sequences: list[_Row], tokens: int, null_class: int, rows: int) -> list[_Row]:
    """Return null sequences that fill up sequences, tokens and text tokens to multiples of `rows`."""
    text_tokens = sum(len(sequence.text) for sequence in sequences if sequence.text is not None)
    count = -len(sequences) % rows
    if count == 0 and (tokens % rows or text_tokens % rows):
        count = rows
    lengths, text_lengths = [1] * count, [0] * count
    if count:
        lengths[-1] += -(tokens + count) % rows
        text_lengths[-1] = -text_tokens % rows
    like = sequences[0]
    return [
        _Row(
            like.tokens.new_zeros(length, like.tokens.shape[1]),
            (1, length),
            like.ratio,
            null_class,
            0.0,
            None if like.text is None else like.text.new_zeros(text_length, like.text.shape[1]),
        )
        for length, text_length in zip(lengths, text_lengths, strict=True)
    ]


def _join(sequences: list[_Row]) -> tuple[PackedSequence, PackedText | None]:
    device = sequences[0].tokens.device
    lengths = torch.tensor([0] + [len(sequence.tokens) for sequence in sequences])
    label, timestep, cu_seqlens, grid, ratio = copy_together(
        [
            torch.tensor([sequence.label for sequence in sequences]),
            torch.tensor([sequence.timestep for sequence in sequences]),
            lengths.cumsum(0, dtype=torch.int32),
            torch.tensor([sequence.grid for sequence in sequences], dtype=torch.int32),
            torch.tensor([sequence.ratio for sequence in sequences], dtype=torch.int32),
        ],
        device,
    )
    packed = PackedSequence(
        tokens=torch.cat([sequence.tokens for sequence in sequences]),
        cu_seqlens=cu_seqlens,
        grid=grid,
        ratio=ratio,
        label=label,
        timestep=timestep,
        max_seqlen=int(lengths.max()),
    )
    texts = [sequence.text for sequence in sequences if sequence.text is not None]
    return packed, PackedText.of(texts) if texts else None


def _guide(state: SamplingState, predicted: list[torch.Tensor], in_channels: int) -> torch.Tensor:
    """Return the guided prediction (n, C) of one image from its conditional and unconditional ones."""
    if state.passes == 1:
        return predicted[0]
    conditional, unconditional = predicted
    guided = torch.lerp(unconditional, conditional, state.guidance)
    if state.guidance_channels is None:
        return guided
    # the channel is the fastest of a token's features
    channel = torch.arange(guided.shape[1], device=guided.device) % in_channels
    return torch.where(channel < state.guidance_channels, guided, conditional)
