"""Noise levels of a diffusion model, and deterministic steps between neighbours in both directions.

Level 0 is the clean latent, level n the noisiest. Both directions of a step between levels i and i + 1 take
the model's prediction at the timestep of level i + 1. So does diffusers' DDIMInverseScheduler, and so does
equation 9, whose noise has the arguments z_{t-1} and t. With the prediction at the timestep of level i, the
same round trip errs several per cent.
"""

from typing import Any, Protocol

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from cat_fast.errors import UserError

EQUATIONS = ("ddim", "paper")
"""Steps of DDIM (Song et al., 2020) as in diffusers, or equations 9 and 10 as they are printed."""


class Trajectory(Protocol):
    """Noise levels 0 .. num_steps."""

    @property
    def num_steps(self) -> int: ...

    def timestep(self, i: int) -> float:
        """Return the model's timestep of level i, 1 .. num_steps."""
        ...

    def invert(self, z: Tensor, prediction: Tensor, i: int) -> Tensor:
        """Return the latent at level i from that at level i - 1 and the prediction at timestep(i)."""
        ...

    def denoise(self, z: Tensor, prediction: Tensor, i: int, noise: Tensor | None) -> Tensor:
        """Return the latent at level i - 1 from that at level i and the prediction at timestep(i).

        Args:
            noise: standard normal numbers of z's shape, for steps that add noise.
        """
        ...

    @property
    def adds_noise(self) -> bool:
        """True if `denoise` needs noise."""
        ...

    def noise_at(self, i: int) -> float:
        """Return the standard deviation of the noise at level i, for latents of unit variance."""
        ...


def make_trajectory(
    schedule: Any, steps: int, equations: str = "ddim", shift: float | None = None
) -> Trajectory:
    """Return the trajectory of a model with `steps` steps.

    Args:
        schedule: the model's diffusers scheduler; its noise levels and prediction type are used.
        equations: one of `EQUATIONS`.
        shift: of a flow's noise levels; None for that of the scheduler.

    Raises:
        UserError: an impossible number of steps, or equations that the schedule does not have.
    """
    if equations not in EQUATIONS:
        raise UserError(f"equations: expected {' or '.join(EQUATIONS)}, got {equations!r}")
    most = schedule.config["num_train_timesteps"]
    if not 1 <= steps <= most:
        raise UserError(f"steps: expected 1 .. {most}, got {steps}")
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        if equations == "paper":
            raise UserError(
                "equations: those of the paper are for models with a noise schedule of DDPM; this model is a"
                " flow, use ddim"
            )
        return FlowTrajectory(schedule, steps, shift)
    return (DDIMTrajectory if equations == "ddim" else PaperTrajectory)(schedule, steps)


class DDIMTrajectory:
    """DDIM with eta 0: the steps of diffusers' DDIMScheduler and DDIMInverseScheduler."""

    adds_noise = False

    def __init__(self, schedule: Any, steps: int) -> None:
        # Both must have the same timesteps; "leading" is the spacing that both support.
        changes = {"timestep_spacing": "leading"}
        self._forward: Any = DDIMScheduler.from_config(schedule.config, **changes)
        self._inverse: Any = DDIMInverseScheduler.from_config(schedule.config, **changes)
        for scheduler in (self._forward, self._inverse):
            scheduler.set_timesteps(steps)
        assert torch.equal(self._forward.timesteps.flip(0), self._inverse.timesteps)

    @property
    def num_steps(self) -> int:
        return len(self._inverse.timesteps)

    def timestep(self, i: int) -> float:
        return float(self._inverse.timesteps[i - 1])

    def invert(self, z: Tensor, prediction: Tensor, i: int) -> Tensor:
        return self._inverse.step(prediction, int(self.timestep(i)), z, return_dict=False)[0]

    def denoise(self, z: Tensor, prediction: Tensor, i: int, noise: Tensor | None) -> Tensor:
        return self._forward.step(prediction, int(self.timestep(i)), z, return_dict=False)[0]

    def noise_at(self, i: int) -> float:
        return float((1 - self._forward.alphas_cumprod[int(self.timestep(i))]) ** 0.5) if i else 0.0


class PaperTrajectory(DDIMTrajectory):
    """Equations 9 and 10 as printed.

    z_t = sqrt(alpha_t) z_{t-1} + sqrt(1 - alpha_t) eps(z_{t-1}, t), the forward process with predicted noise
    in place of random noise. alpha_t is read as the ratio of the cumulative products of neighbouring levels:
    the cumulative product itself would be applied once per step. z_{t-1} = f(z_t, g, t) + eps is read as the
    ancestral step of DDPM, which adds noise of the posterior's variance.

    The two are not inverse to each other: a round trip does not return its start, even with exact
    predictions.
    """

    adds_noise = True

    def invert(self, z: Tensor, prediction: Tensor, i: int) -> Tensor:
        alpha = self._alpha(i) / self._alpha(i - 1)
        return alpha**0.5 * z + (1 - alpha) ** 0.5 * self._noise_of(z, prediction, i - 1)

    def denoise(self, z: Tensor, prediction: Tensor, i: int, noise: Tensor | None) -> Tensor:
        assert noise is not None
        before, here = self._alpha(i - 1), self._alpha(i)
        step = here / before
        clean = (z - (1 - here) ** 0.5 * self._noise_of(z, prediction, i)) / here**0.5
        # equations (7) of Ho et al. (2020)
        mean = (before**0.5 * (1 - step) * clean + step**0.5 * (1 - before) * z) / (1 - here)
        variance = (1 - before) / (1 - here) * (1 - step)
        return mean + (variance**0.5 * noise if i > 1 else 0)

    def _alpha(self, i: int) -> float:
        """Return the cumulative product of level i; 1 at level 0."""
        return float(self._forward.alphas_cumprod[int(self.timestep(i))]) if i else 1.0

    def _noise_of(self, z: Tensor, prediction: Tensor, i: int) -> Tensor:
        """Return the noise that a prediction for a latent of level i implies."""
        kind, alpha = self._forward.config["prediction_type"], self._alpha(i)
        if kind == "epsilon":
            return prediction
        if kind == "v_prediction":
            return alpha**0.5 * prediction + (1 - alpha) ** 0.5 * z
        raise UserError(f"prediction_type: expected epsilon or v_prediction, got {kind!r}")


class FlowTrajectory:
    """Euler steps of a rectified flow, whose prediction is noise - clean.

    Args:
        schedule: the model's scheduler.
        steps: number of steps.
        shift: of the noise levels; None for that of the scheduler.
    """

    adds_noise = False

    def __init__(self, schedule: FlowMatchEulerDiscreteScheduler, steps: int, shift: float | None) -> None:
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(schedule.config)
        if shift is not None:
            scheduler.set_shift(shift)
        scheduler.set_timesteps(steps)
        self._sigmas: list[float] = scheduler.sigmas.flip(0).tolist()  # from 0 to the noisiest
        self._timesteps: list[float] = [0.0, *scheduler.timesteps.flip(0).tolist()]

    @property
    def num_steps(self) -> int:
        return len(self._sigmas) - 1

    def timestep(self, i: int) -> float:
        return self._timesteps[i]

    def invert(self, z: Tensor, prediction: Tensor, i: int) -> Tensor:
        return z + (self._sigmas[i] - self._sigmas[i - 1]) * prediction

    def denoise(self, z: Tensor, prediction: Tensor, i: int, noise: Tensor | None) -> Tensor:
        return z - (self._sigmas[i] - self._sigmas[i - 1]) * prediction

    def noise_at(self, i: int) -> float:
        return self._sigmas[i]
