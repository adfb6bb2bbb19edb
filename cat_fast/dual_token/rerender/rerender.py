"""Re-rendering of guides: inversion without a condition, denoising with one (section 3.3).

The guide fixes the starting noise, and with it the layout; the condition, predicted from the semantic codes,
fixes what is drawn. The size of the image is chosen here, independent of the number of tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cat_fast.dual_token.rerender.backend import Backend, Size
from cat_fast.dual_token.rerender.trajectory import EQUATIONS, Trajectory
from cat_fast.dual_token.resize import resize
from cat_fast.errors import UserError
from cat_fast.generator.noise import CounterNoise

MODES = ("full", "semantic", "unconditioned", "guide")
"""`full`: the method. Ablations: `semantic` starts from random noise, without the guide; `unconditioned`
denoises without the condition; `guide` only enlarges the guide."""


@dataclass(frozen=True, kw_only=True)
class RerenderSettings:
    """Options of re-rendering.

    Raises:
        UserError: a value out of its range.
    """

    steps: int = 50
    """Number of noise levels, of inversion and of denoising."""
    strength: float = 1.0
    """Fraction of the levels to invert and denoise: 1 reaches pure noise, lower values stay closer to the
    guide, 0 returns it."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the denoising; 1 disables it. Inversion has no condition."""
    fixed_point: int = 0
    """Number of fixed-point iterations per inversion step (AIDI; Pan et al., 2023): the prediction is
    repeated at the step's own result, which makes inversion and denoising exact inverses in the limit."""
    equations: str = "ddim"
    """`ddim`, or `paper` for equations 9 and 10 as printed (`PaperTrajectory`)."""
    mode: str = "full"
    """One of `MODES`."""

    @property
    def total_steps(self) -> int:
        """Number of steps per image, both directions together."""
        if self.mode == "guide":
            return 0
        return self.steps if self.mode == "semantic" else 2 * round(self.strength * self.steps)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps: expected at least 1, got {self.steps}")
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength: expected 0 to 1, got {self.strength}")
        if not abs(self.guidance_scale) <= torch.finfo(torch.float32).max:
            raise UserError(f"guidance_scale: expected a finite number, got {self.guidance_scale}")
        if self.fixed_point < 0:
            raise UserError(f"fixed_point: expected 0 or more iterations, got {self.fixed_point}")
        for name, known in (("equations", EQUATIONS), ("mode", MODES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}: expected {', '.join(known)}, got {getattr(self, name)!r}")


@torch.no_grad()
def rerender(
    backend: Backend,
    guides: Tensor | None,
    conditions: Sequence[Tensor] | None,
    size: Size | None = None,
    settings: RerenderSettings | None = None,
    seeds: Sequence[int] | None = None,
    on_step: Callable[[], Any] = lambda: None,
) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1].

    Args:
        guides: (B, 3, h, w) in [-1, 1]; not used by the mode `semantic`.
        conditions: text states (n, T) per image; not used by the modes `unconditioned` and `guide`.
        size: height and width of the images; None for the size that the model was trained on.
        seeds: of the noise of each image, for the mode `semantic` and the equations `paper`; 0, 1, ... if
            None.
        on_step: called after each step of each direction.

    Raises:
        UserError: a size that the model cannot draw, a missing guide or condition, or a result with NaN.
    """
    settings = settings or RerenderSettings()
    size = size or backend.default_size
    backend.check_size(size)
    count = _count(guides, conditions, settings.mode)
    enlarged = None
    if guides is not None:
        enlarged = resize(guides.to(backend.device, torch.float32), size)
        if settings.mode == "guide":
            return enlarged
    trajectory = backend.trajectory(settings.steps, size, settings.equations)
    noises = [CounterNoise.from_seed(seed) for seed in (seeds if seeds is not None else range(count))]
    if len(noises) != count:
        raise UserError(f"seeds: expected one per image, {count} in all, got {len(noises)}")
    if settings.mode == "semantic":
        top = trajectory.num_steps
        start = _noise(backend, noises, 0, size)
    else:
        assert enlarged is not None
        top = round(settings.strength * trajectory.num_steps)
        start = invert(backend, trajectory, backend.encode(enlarged), top, settings.fixed_point, on_step)
    own = None if settings.mode == "unconditioned" else conditions
    clean = denoise(backend, trajectory, start, top, own, settings.guidance_scale, noises, size, on_step)
    images = backend.decode(clean).clamp(-1, 1)
    if not torch.isfinite(images).all():
        raise UserError("the images contain NaN or infinite values; lower guidance_scale or strength")
    return images


def invert(
    backend: Backend,
    trajectory: Trajectory,
    clean: Tensor,
    top: int,
    fixed_point: int = 0,
    on_step: Callable[[], Any] = lambda: None,
) -> Tensor:
    """Return the latents at level `top` whose unconditional denoising leads back to `clean`."""
    z = clean
    for i in range(1, top + 1):
        time = trajectory.timestep(i)
        result = trajectory.invert(z, backend.predict(z, time, None), i)
        for _ in range(fixed_point):
            result = trajectory.invert(z, backend.predict(result, time, None), i)
        z = result
        on_step()
    return z


def denoise(
    backend: Backend,
    trajectory: Trajectory,
    noisy: Tensor,
    top: int,
    conditions: Sequence[Tensor] | None,
    guidance_scale: float,
    noises: Sequence[CounterNoise],
    size: Size,
    on_step: Callable[[], Any] = lambda: None,
) -> Tensor:
    """Return the clean latents from those at level `top`."""
    z = noisy
    for i in range(top, 0, -1):
        time = trajectory.timestep(i)
        prediction = backend.predict(z, time, conditions)
        if conditions is not None and guidance_scale != 1:
            prediction = torch.lerp(backend.predict(z, time, None), prediction, guidance_scale)
        noise = _noise(backend, noises, i, size) if trajectory.adds_noise else None
        z = trajectory.denoise(z, prediction, i, noise)
        on_step()
    return z


def _noise(backend: Backend, noises: Sequence[CounterNoise], draw: int, size: Size) -> Tensor:
    """Return noise (B, c, h, w), each image's from its own source, so that batches change nothing."""
    shape = backend.latent_shape(size)
    return torch.stack([noise.normal(draw, shape) for noise in noises]).to(backend.device)


def _count(guides: Tensor | None, conditions: Sequence[Tensor] | None, mode: str) -> int:
    if guides is None and mode != "semantic":
        raise UserError(f"guides: the mode {mode} needs one per image; without guides use the mode semantic")
    if conditions is None and mode in ("full", "semantic"):
        raise UserError(f"conditions: the mode {mode} needs semantic codes; without them use unconditioned")
    counts = {len(given) for given in (guides, conditions) if given is not None}
    if len(counts) != 1 or 0 in counts:
        raise UserError(f"expected as many guides as conditions, at least one, got {sorted(counts)}")
    return counts.pop()
