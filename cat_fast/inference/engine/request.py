"""`EngineRequest`: everything that determines an image, and how urgent it is."""

import math
from dataclasses import dataclass, replace

from cat_fast.errors import UserError
from cat_fast.generator.noise import CounterNoise
from cat_fast.generator.sampling import SampleRequest, guidance_scales, passes_of
from cat_fast.generator.solvers import Sampler
from cat_fast.integers import store_integers


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One image to draw.

    Raises:
        UserError: a value out of range.
    """

    sample: SampleRequest
    """Label, ratio, grid, seed and text, from `CATPipeline.plan`."""
    num_inference_steps: int = 50
    guidance_scale: float = 1.5
    """Scale of classifier-free guidance; 1 disables it and halves the cost of a step."""
    guidance_channels: int | None = None
    """Number of leading latent channels to guide; None for all."""
    scheduler: Sampler | None = None
    """Name of the solver; None for the pipeline's scheduler."""
    noise: CounterNoise | None = None
    """Source of noise, instead of that of the sample's seed."""
    decode: bool = True
    """False to return the latent only."""
    priority: int = 0
    """Requests of higher priority are served first, but never starve others."""
    deadline: float | None = None
    """Seconds from submission in which the image must be complete, or else the request is refused."""
    coarser: tuple[SampleRequest, ...] = ()
    """The same image at coarser ratios, finest first; one of them may be drawn instead under load."""
    coarser_guidance: tuple[float, ...] = ()
    """Guidance scales of `coarser`; empty for `guidance_scale`."""
    complexity: float = 5.0
    """Expected complexity score, 1 to 9: simple images move to a coarser ratio first."""
    preview_every: int = 0
    """Number of steps between previews; 0 for none."""

    def __post_init__(self) -> None:
        store_integers(self, "num_inference_steps", "priority", "preview_every")
        if self.num_inference_steps < 1:
            raise UserError(f"num_inference_steps: expected at least 1, got {self.num_inference_steps}")
        guidance_scales(self.guidance_scale, [self.sample.ratio])
        if len(self.coarser_guidance) not in (0, len(self.coarser)):
            raise UserError(
                f"coarser_guidance: expected {len(self.coarser)} scales, one per coarser ratio, got"
                f" {len(self.coarser_guidance)}"
            )
        if self.preview_every < 0:
            raise UserError(
                f"preview_every: expected a number of steps, 0 for none, got {self.preview_every}"
            )
        if self.deadline is not None and not (self.deadline > 0 and math.isfinite(self.deadline)):
            raise UserError(f"deadline: expected a positive number of seconds, got {self.deadline}")

    @property
    def variants(self) -> tuple["EngineRequest", ...]:
        """The request itself, then at each coarser ratio with its guidance."""
        scales = self.coarser_guidance or (self.guidance_scale,) * len(self.coarser)
        return self, *(
            replace(self, sample=sample, guidance_scale=scale, coarser=(), coarser_guidance=())
            for sample, scale in zip(self.coarser, scales, strict=True)
        )

    @property
    def passes(self) -> int:
        """Number of sequences per step: 2 with the unconditional twin of guidance, else 1."""
        return passes_of(self.guidance_scale)
