"""Sampling of packed sequences with classifier-free guidance and diffusers schedulers."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from cat_fast.errors import UserError
from cat_fast.generator.diffusion import Schedule, check_betas
from cat_fast.generator.dit import DiT
from cat_fast.generator.packed_text import PackedText
from cat_fast.integers import store_integers
from cat_fast.packing import PackedSequence

Sampler = Literal["ddpm", "ddim", "dpm++", "euler"]
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


def make_sampler(schedule: Schedule, name: Sampler) -> Any:
    """Return the diffusers scheduler `name` with the noise levels of the training schedule.

    Raises:
        UserError: `name` is not "ddpm", "ddim" or "dpm++", or not "euler" for a flow.
    """
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        if name == "euler":
            return FlowMatchEulerDiscreteScheduler.from_config(schedule.config)
        raise UserError(
            f"scheduler: expected 'euler', because this model was trained as a flow, got {name!r}"
        )
    if name == "ddpm":
        return DDPMScheduler.from_config(schedule.config)
    if name == "ddim":
        return DDIMScheduler.from_config(schedule.config)
    if name == "dpm++":
        # DPM-Solver++ cannot clip predicted clean latents, so it starts where they contain enough signal: at
        # alpha / sigma = exp(-2.5) = 0.08. Starting at the schedule's end multiplies the error of a trained
        # model by ten or more. With "leading" spacing the start would depend on the number of steps.
        return DPMSolverMultistepScheduler.from_config(
            schedule.config,
            algorithm_type="dpmsolver++",
            timestep_spacing="linspace",
            lambda_min_clipped=-2.5,
        )
    raise UserError(f"scheduler: expected 'ddpm', 'ddim' or 'dpm++', got {name!r}")


def set_steps(schedule: Any, name: Sampler | None, steps: int) -> Any:
    """Return `make_sampler(schedule, name)`, or a copy of `schedule` if `name` is None, with timesteps set.

    Raises:
        UserError: `steps` is below 1, or above the number of distinct timesteps of the sampler.
    """
    max_steps = schedule.config["num_train_timesteps"]
    if not 1 <= steps <= max_steps:
        raise UserError(f"steps: expected 1 .. {max_steps}, got {steps}")
    sampler = copy.deepcopy(schedule) if name is None else make_sampler(schedule, name)
    sampler.set_timesteps(steps)
    if len(sampler.timesteps.unique()) < steps:
        raise UserError(
            f"steps: {type(sampler).__name__} has fewer than {steps} distinct timesteps; use fewer steps"
        )
    return sampler


@torch.no_grad()
def sample(
    model: DiT,
    requests: Sequence[SampleRequest],
    schedule: Schedule,
    *,
    sampler: Sampler | None = "ddpm",
    steps: int = 250,
    guidance: Guidance = 1.5,
    guidance_channels: int | None = None,
    text: PackedText | None = None,
    generators: Sequence[torch.Generator] | None = None,
    device: torch.device | None = None,
    on_step: Callable[[int, torch.Tensor, PackedSequence], PackedSequence | None] | None = None,
) -> list[torch.Tensor]:
    """Sample latents (c, h, w), float32, one per request, in the model's scale.

    Each step is one forward pass over all requests. Unless `guidance` is 1, the pass includes their
    unconditional copies: eps = eps_null + guidance * (eps_label - eps_null). An image depends only on its own
    request, up to rounding: the batch size changes the shape of matrix products.

    Args:
        model: transformer in evaluation mode; in training mode it would drop labels.
        schedule: the schedule the model was trained with.
        sampler: name of the solver; None for `schedule` itself.
        steps: number of solver steps.
        guidance: scale of classifier-free guidance; 1 disables it. A mapping from ratios has one scale per
            ratio.
        guidance_channels: number of leading latent channels to guide, None for all. The others keep the
            conditional prediction. The original DiT guides 3 of 4.
        text: one encoded text per request, for a model with text.
        generators: one per request, instead of generators seeded with `SampleRequest.seed`.
        device: device for the computation; default `model.device`, which differs for an offloaded model.
        on_step: called after every step with its index, its timestep and the tokens; may return other tokens.

    Raises:
        UserError: `requests` is empty, `steps` or `guidance_channels` is out of range, `guidance` lacks a
            ratio, the model is in training mode, or it was trained with other betas than those of `schedule`.
    """
    if not requests:
        raise UserError("requests: expected at least one, got none")
    if model.training:
        raise UserError(
            "model: expected evaluation mode, got training mode, which drops labels; call model.eval()"
        )
    check_betas(model, schedule)
    check_guidance_channels(guidance_channels, model.config.in_channels)
    scales = guidance_scales(guidance, [request.ratio for request in requests])
    generators = generators or [torch.Generator().manual_seed(request.seed) for request in requests]
    packed = _initial_noise(model, requests, generators).to(device or model.device)
    shift_tokens = getattr(model.config, "noise_shift_tokens", None)
    solver = _PackedSolver(set_steps(schedule, sampler, steps), requests, generators, shift_tokens)
    for step, timestep in enumerate(solver.timesteps):
        timesteps = solver.timesteps_at(step).to(packed.device)
        noise = _guided_noise(model, packed.replace(timestep=timesteps), scales, guidance_channels, text)
        tokens = solver.step(noise, step, packed.tokens)
        packed = packed.replace(tokens=tokens)
        if on_step is not None:
            packed = on_step(step, timestep, packed) or packed
    return packed.to_latents(model.config.patch_size)


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


def _initial_noise(
    model: DiT, requests: Sequence[SampleRequest], generators: Sequence[torch.Generator]
) -> PackedSequence:
    p, channels = model.config.patch_size, model.config.in_channels
    noise = [
        torch.randn(
            channels, p * request.grid[0], p * request.grid[1], generator=generator, device=generator.device
        ).cpu()
        for request, generator in zip(requests, generators, strict=True)
    ]
    ratios, labels = [request.ratio for request in requests], [request.label for request in requests]
    return PackedSequence.from_latents(noise, ratios, p, labels=labels)


def _guided_noise(
    model: DiT,
    packed: PackedSequence,
    scales: Sequence[float],
    guidance_channels: int | None,
    text: PackedText | None,
) -> torch.Tensor:
    """Predict the noise (T, C), float32, with the guidance scale of each sequence."""
    if all(scale == 1 for scale in scales):
        return model(packed, text=text, return_dict=False)[0].float()
    null = packed.replace(label=torch.full((len(packed),), model.config.num_classes, device=packed.device))
    both = PackedSequence.concat([packed, null])
    texts = None if text is None else PackedText.concat([text, text.null()])
    conditional, unconditional = model(both, text=texts, return_dict=False)[0].float().chunk(2)
    if len({*scales}) == 1:
        guided = torch.lerp(unconditional, conditional, scales[0])
    else:
        scale = torch.tensor(scales, device=packed.device)[packed.sequence_index(), None]
        guided = torch.lerp(unconditional, conditional, scale)
    if guidance_channels is None:
        return guided
    # the channel is the fastest of a token's features
    channel = torch.arange(guided.shape[1], device=guided.device) % model.config.in_channels
    return torch.where(channel < guidance_channels, guided, conditional)


class _PackedSolver:
    """Diffusers scheduler that steps over packed tokens.

    Schedulers expect a dense batch, and multistep schedulers keep past outputs. Sequences of equal length are
    therefore stacked, and each length has its own scheduler, with the noise levels of its length.
    """

    def __init__(
        self,
        scheduler: Any,
        requests: Sequence[SampleRequest],
        generators: Sequence[torch.Generator],
        shift_tokens: float | None = None,
    ) -> None:
        self.timesteps = scheduler.timesteps
        self._lengths = [request.num_tokens for request in requests]
        self._groups: dict[int, list[int]] = defaultdict(list)
        for s, length in enumerate(self._lengths):
            self._groups[length].append(s)
        self._generators = generators
        self._schedulers = {
            length: _shifted(copy.deepcopy(scheduler), length, shift_tokens) for length in self._groups
        }

    def timesteps_at(self, step: int) -> torch.Tensor:
        """Return the timestep of each sequence at a step, (S,)."""
        return torch.stack([self._schedulers[length].timesteps[step] for length in self._lengths])

    def step(self, noise: torch.Tensor, step: int, tokens: torch.Tensor) -> torch.Tensor:
        """Take one step from the predicted noise (T, C) and the tokens (T, C); return the new tokens."""
        noises, samples = noise.split(self._lengths), tokens.split(self._lengths)
        result: list[torch.Tensor] = [tokens] * len(samples)
        for length, members in self._groups.items():
            previous = (
                self._schedulers[length]
                .step(
                    torch.stack([noises[s] for s in members]),
                    self._schedulers[length].timesteps[step],
                    torch.stack([samples[s] for s in members]),
                    generator=[self._generators[s] for s in members],
                )
                .prev_sample
            )
            for s, one in zip(members, previous, strict=True):
                result[s] = one
        return torch.cat(result)


def _shifted(scheduler: Any, length: int, shift_tokens: float | None) -> Any:
    """Set a flow's timesteps for sequences of `length` tokens, as `shift_noise` shifts them in training."""
    if shift_tokens is not None and isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_shift(math.sqrt(length / shift_tokens))
        scheduler.set_timesteps(len(scheduler.timesteps))
    return scheduler
