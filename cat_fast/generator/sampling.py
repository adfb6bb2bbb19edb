"""Sampling packed sequences of mixed ratios with classifier-free guidance and any diffusers scheduler."""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from cat_fast.errors import UserError
from cat_fast.generator.diffusion import Schedule
from cat_fast.generator.dit import DiT
from cat_fast.generator.packed_text import PackedText
from cat_fast.packing import PackedSequence

Sampler = Literal["ddpm", "ddim", "dpm++", "euler"]


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One image to draw."""

    label: int
    """Class index; the number of classes is the null class."""
    ratio: int
    """Compression ratio of the latent."""
    grid: tuple[int, int]
    """Height and width of the latent in tokens."""
    seed: int
    """Everything random in this image comes from it, and from nothing else."""
    text: str = ""
    """What a model with text is told of it; empty is nothing."""

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


def make_sampler(schedule: Schedule, name: Sampler) -> Any:
    """The diffusers scheduler called `name` on the noise levels the model was trained with.

    Raises:
        UserError: another name than "ddpm", "ddim" or "dpm++"; of a flow, than "euler".
    """
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        if name == "euler":
            return FlowMatchEulerDiscreteScheduler.from_config(schedule.config)
        raise UserError(f"scheduler {name!r}: this model was trained as a flow, which 'euler' solves")
    if name == "ddpm":
        return DDPMScheduler.from_config(schedule.config)
    if name == "ddim":
        return DDIMScheduler.from_config(schedule.config)
    if name == "dpm++":
        # It cannot clip the clean latents it predicts, so it starts where they can be told from noise: at
        # alpha / sigma = exp(-2.5) = 0.08. Starting at the schedule's end multiplies the error of a trained
        # model tenfold and more; "leading" spacing would begin ever later the more steps are asked for.
        return DPMSolverMultistepScheduler.from_config(
            schedule.config,
            algorithm_type="dpmsolver++",
            timestep_spacing="linspace",
            lambda_min_clipped=-2.5,
        )
    raise UserError(f"scheduler {name!r}: expected 'ddpm', 'ddim' or 'dpm++'")


def set_steps(schedule: Any, name: Sampler | None, steps: int) -> Any:
    """Return `make_sampler(schedule, name)`, or a copy of `schedule` if `name` is None, set to `steps` steps.

    Raises:
        UserError: an unknown name, no steps, or more than the scheduler has different timesteps.
    """
    most = schedule.config["num_train_timesteps"]
    if not 1 <= steps <= most:
        raise UserError(f"{steps} steps: expected 1 .. {most}")
    sampler = copy.deepcopy(schedule) if name is None else make_sampler(schedule, name)
    sampler.set_timesteps(steps)
    if len(sampler.timesteps.unique()) < steps:
        raise UserError(f"{type(sampler).__name__} cannot take {steps} different steps; ask for fewer")
    return sampler


@torch.no_grad()
def sample(
    model: DiT,
    requests: Sequence[SampleRequest],
    schedule: Schedule,
    *,
    sampler: Sampler | None = "ddpm",
    steps: int = 250,
    guidance: float = 1.5,
    text: PackedText | None = None,
    generators: Sequence[torch.Generator] | None = None,
    device: torch.device | None = None,
    on_step: Callable[[int, torch.Tensor, PackedSequence], PackedSequence | None] | None = None,
) -> list[torch.Tensor]:
    """Draw latents (c, h, w), float32, one for each request, in the model's scale.

    All requests take each step in one forward pass, with their unconditional twins beside them where
    `guidance` is not 1: eps = eps_null + guidance * (eps_label - eps_null). An image depends on its own
    request only, up to the rounding of matrix products of another height.

    Args:
        model: in eval mode, or label dropout would act.
        schedule: what the model was trained with.
        sampler, steps: the solver and its number of steps; a sampler of None is `schedule` itself.
        guidance: 1 is none.
        text: that of each request, encoded, for a model with text.
        generators: one per request, used in place of generators seeded with `SampleRequest.seed`.
        device: where the model computes; `model.device` if None. An offloaded model is elsewhere at first.
        on_step: called after every step with its index, its timestep and the tokens, which it may replace by
            returning others.

    Raises:
        UserError: no request, more steps than the sampler has, or a model in training mode.
    """
    if not requests:
        raise UserError("no request: expected at least one image to draw")
    if model.training:
        raise UserError("the model is in training mode, which drops labels; call model.eval() first")
    generators = generators or [torch.Generator().manual_seed(request.seed) for request in requests]
    packed = _initial_noise(model, requests, generators).to(device or model.device)
    solver = _PackedSolver(set_steps(schedule, sampler, steps), requests, generators)
    for step, timestep in enumerate(solver.timesteps):
        noise = _guided_noise(model, packed, timestep, guidance, text)
        tokens = solver.step(noise, timestep, packed.tokens)
        packed = packed.replace(tokens=tokens)
        if on_step is not None:
            packed = on_step(step, timestep, packed) or packed
    return packed.to_latents(model.config.patch_size)


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
    model: DiT, packed: PackedSequence, timestep: torch.Tensor, guidance: float, text: PackedText | None
) -> torch.Tensor:
    """(T, C) float32 noise estimate at one timestep for all sequences."""
    packed = packed.replace(timestep=timestep.to(packed.device).expand(len(packed)))
    told: dict[str, PackedText] = {} if text is None else {"text": text}
    if guidance == 1:
        return model(packed, **told).float()
    null = packed.replace(label=torch.full((len(packed),), model.config.num_classes, device=packed.device))
    both = PackedSequence.concat([packed, null])
    if text is not None:
        told = {"text": PackedText.concat([text, text.null()])}
    conditional, unconditional = model(both, **told).float().chunk(2)
    return torch.lerp(unconditional, conditional, guidance)


class _PackedSolver:
    """A diffusers scheduler stepping over packed tokens.

    Schedulers want one dense batch, and multistep ones remember past outputs: so sequences of equal length
    are stacked, and each length has a scheduler of its own.
    """

    def __init__(
        self,
        scheduler: Any,
        requests: Sequence[SampleRequest],
        generators: Sequence[torch.Generator],
    ) -> None:
        self.timesteps = scheduler.timesteps
        self._lengths = [request.num_tokens for request in requests]
        self._groups: dict[int, list[int]] = defaultdict(list)
        for s, length in enumerate(self._lengths):
            self._groups[length].append(s)
        self._generators = generators
        self._schedulers = {length: copy.deepcopy(scheduler) for length in self._groups}

    def step(self, noise: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """One step: estimated noise (T, C) and tokens (T, C) -> tokens (T, C)."""
        noises, samples = noise.split(self._lengths), tokens.split(self._lengths)
        result: list[torch.Tensor] = [tokens] * len(samples)
        for length, members in self._groups.items():
            previous = (
                self._schedulers[length]
                .step(
                    torch.stack([noises[s] for s in members]),
                    timestep,
                    torch.stack([samples[s] for s in members]),
                    generator=[self._generators[s] for s in members],
                )
                .prev_sample
            )
            for s, one in zip(members, previous, strict=True):
                result[s] = one
        return torch.cat(result)
