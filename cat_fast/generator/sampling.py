"""Sampling of packed sequences, one stage at a time: `prepare`, `denoise_step` and `scheduler_step`.

    states = [prepare(model, request, set_steps(schedule, "ddim", 30)) for request in requests]
    while not states[0].finished:
        for state, prediction in zip(states, denoise_step(model, states), strict=True):
            scheduler_step(state, prediction)

Images of one step may differ in ratio, size, timestep, scheduler, guidance and text. With steps filled up to
a block that the machine's matrix products are invariant to, an image's bits do not depend on the others of
its steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from cat_fast.errors import UserError
from cat_fast.generator.captured_step import predict
from cat_fast.generator.diffusion import check_betas
from cat_fast.generator.dit import DiT
from cat_fast.generator.noise import CounterNoise, Draw, draw_together
from cat_fast.generator.packed_text import PackedText
from cat_fast.generator.solvers import Solver
from cat_fast.generator.step_pack import Filling, StepRow, join
from cat_fast.integers import store_integers
from cat_fast.kernels.pack.op import pack, unpack
from cat_fast.packing import PackedSequence

Guidance = float | Mapping[int, float]
"""Scale of classifier-free guidance; 1 disables it. A mapping has one scale per ratio."""
Forward = Callable[[PackedSequence, PackedText | None], torch.Tensor]
"""Returns the prediction (T, C), float32, for a pack."""
NOT_FILLED = Filling()


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
    noise: torch.Tensor | None = None
    """Noise of the next scheduler step, from `draw_noise`; None to draw it then."""

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
    (drawn,) = draw_together([Draw(noise, 0, (config.in_channels, height, width))], device)
    tokens = pack([drawn], config.patch_size)
    if text is None and config.text_dim is not None:
        text = torch.empty(0, config.text_dim, dtype=model.dtype)
    return SamplingState(
        request=request,
        tokens=tokens,
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
def denoise_step(
    model: DiT,
    states: Sequence[SamplingState],
    *,
    filling: Filling = NOT_FILLED,
    forward: Forward | None = None,
) -> list[torch.Tensor]:
    """Predict the noise (n, C), float32, of every state in one forward pass, with guidance.

    Args:
        model: transformer in evaluation mode.
        states: none of them finished.
        filling: sizes that the pass is filled up to.
        forward: runs the model on a pack, such as a `CapturedStep`; by default runs it eagerly.
    """
    step = pack_step(model, states, filling)
    predicted = (forward or partial(predict, model))(step.packed, step.text)
    return [
        _guide(state, [predicted[part] for part in parts], model.config.in_channels)
        for state, parts in zip(states, step.parts, strict=True)
    ]


def draw_noise(states: Sequence[SamplingState]) -> None:
    """Draw the noise of the next scheduler step of all states at once, which launches as much as for one."""
    draws = {
        i: draw
        for i, state in enumerate(states)
        if (draw := state.solver.next_draw(tuple(state.tokens.shape))) is not None
    }
    if draws:
        drawn = draw_together(list(draws.values()), states[0].tokens.device)
        for i, noise in zip(draws, drawn, strict=True):
            states[i].noise = noise


def scheduler_step(state: SamplingState, prediction: torch.Tensor) -> None:
    """Advance a state by one step from the guided prediction (n, C)."""
    state.tokens, state.noise = state.solver.advance(prediction, state.tokens, state.noise), None


class StepPack(NamedTuple):
    """Input of one forward pass."""

    packed: PackedSequence
    text: PackedText | None
    parts: list[list[slice]]
    """Tokens of each state: its conditional sequence and, with guidance, the unconditional one."""


def pack_step(model: DiT, states: Sequence[SamplingState], filling: Filling = NOT_FILLED) -> StepPack:
    """Pack the sequences of one step, each with its own timestep, label, ratio, size and text.

    Sequences of equal length are adjacent.
    """
    null_class = model.config.num_classes
    rows: list[StepRow] = []
    parts: list[list[slice]] = [[] for _ in states]
    total = 0
    for i in sorted(range(len(states)), key=lambda i: states[i].request.num_tokens):
        state, request = states[i], states[i].request
        timestep, null_text = float(state.solver.timestep), None if state.text is None else state.text[:0]
        twins = ((request.label, state.text), (null_class, null_text))[: state.passes]
        for label, text in twins:
            rows.append(StepRow(state.tokens, request.grid, request.ratio, label, timestep, text))
            parts[i].append(slice(total, total + request.num_tokens))
            total += request.num_tokens
    return StepPack(*join(*filling.fill(rows, null_class)), parts)


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
