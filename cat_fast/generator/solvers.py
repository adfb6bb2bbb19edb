"""diffusers schedulers as solvers of one image each, with counter-based noise."""

import copy
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from cat_fast.errors import UserError
from cat_fast.generator.diffusion import Schedule
from cat_fast.generator.noise import CounterNoise, Draw, draw_together

Sampler = Literal["ddpm", "ddim", "dpm++", "euler"]


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


class Solver:
    """A diffusers scheduler that steps the tokens of one image.

    Args:
        scheduler: with timesteps set, from `set_steps`; the solver works on a copy, which holds the history
            of multistep solvers.
        noise: of the image; step k of a stochastic solver adds draw k + 1.
        shift: of a flow's noise levels; None for those of the scheduler.
    """

    def __init__(self, scheduler: Any, noise: CounterNoise, shift: float | None = None) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        if shift is not None and isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            self._scheduler.set_shift(shift)
            self._scheduler.set_timesteps(len(scheduler.timesteps))
        self._noise = noise
        self._silent: Any = None
        if isinstance(scheduler, DDPMScheduler):
            self._silent = copy.copy(self._scheduler)
            self._silent.__class__ = _Silent
        self.step = 0
        """Number of steps done."""

    @property
    def num_steps(self) -> int:
        return len(self._scheduler.timesteps)

    @property
    def timesteps(self) -> torch.Tensor:
        """Timesteps of all steps."""
        return self._scheduler.timesteps

    @property
    def timestep(self) -> torch.Tensor:
        """Timestep of the next step."""
        return self._scheduler.timesteps[self.step]

    def next_draw(self, shape: tuple[int, ...]) -> Draw | None:
        """Return the draw that the next step adds to tokens of `shape`; None if it adds no noise."""
        if isinstance(self._scheduler, DDPMScheduler):
            adds_noise = bool(self.timestep > 0)
        else:
            adds_noise = str(self._scheduler.config.get("algorithm_type")).startswith("sde")
        return Draw(self._noise, self.step + 1, shape) if adds_noise else None

    def advance(
        self, prediction: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Take one step from the model's prediction and the tokens, (n, C) each; return the new tokens.

        `noise` holds the values of `next_draw`, if they are drawn already.
        """
        scheduler: Any = self._scheduler
        timestep: Any = self.timestep
        draw = self.next_draw(tuple(tokens.shape))
        if draw is not None and noise is None:
            (noise,) = draw_together([draw], tokens.device)
        self.step += 1
        options: dict[str, Any] = {}
        if isinstance(scheduler, DDPMScheduler):
            return self._ancestral_step(prediction, timestep, tokens, noise)
        if noise is not None:
            options["variance_noise"] = noise[None]
        if scheduler.config.get("stochastic_sampling"):
            options["generator"] = self._noise.generator(self.step)
        return scheduler.step(prediction[None], timestep, tokens[None], **options).prev_sample[0]

    def clean_estimate(self, prediction: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the clean tokens (n, C) that a prediction at the next step's timestep implies."""
        scheduler: Any = self._scheduler
        timestep = self.timestep
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return tokens - scheduler.sigmas[self.step] * prediction
        alpha = scheduler.alphas_cumprod[int(timestep)]
        if scheduler.config["prediction_type"] == "v_prediction":
            clean = alpha.sqrt() * tokens - (1 - alpha).sqrt() * prediction
        else:
            clean = (tokens - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
        limit = scheduler.config.get("clip_sample_range") if scheduler.config.get("clip_sample") else None
        return clean if limit is None else clean.clamp(-limit, limit)

    def _ancestral_step(
        self, prediction: torch.Tensor, timestep: Any, tokens: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Take a DDPM step: its mean, equation (7) of Ho et al. (2020), and noise of its variance."""
        scratch = torch.Generator(tokens.device)  # not torch's default generator, which belongs to the user
        mean = self._silent.step(prediction[None], timestep, tokens[None], generator=scratch).prev_sample[0]
        if noise is None:
            return mean
        deviation: Any = self._scheduler._get_variance(timestep)
        if self._scheduler.variance_type != "fixed_small_log":
            deviation = deviation**0.5
        return mean + deviation * noise


class _Silent(DDPMScheduler):
    """DDPM whose step adds no noise: diffusers draws it from a sequential generator only."""

    def _get_variance(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros(())
