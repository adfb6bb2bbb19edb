"""Configuration dataclasses of the dual-token tokenizer's training stages."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from cat_fast.data.sampling.ratio_sampler import RatioSamplerConfig
from cat_fast.dual_token.grid import SIDES, Grid, as_grid
from cat_fast.training.config.deepspeed_json import GAN_ZERO_STAGES
from cat_fast.training.config.settings import ImageDataConfig, RunConfig, require

_ANY_RATIO = 8
"""Images of the dual-token tokenizer have no ratio; the image source gets one that all of them share."""


@dataclass(kw_only=True)
class CodebookConfig:
    """Updates of a codebook."""

    decay: float = 0.99
    """Decay per step of the averages of codes and of their use."""
    revive_every_steps: int = 20
    """Steps between revivals: dead codes become vectors of the current batch; 0 disables them."""
    revive_below: float = 0.1
    """A code is dead if its average use is below this fraction of that of a uniformly used code."""
    commitment_weight: float = 0.25
    """Weight of the distance from the encoder's vectors to their codes."""

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, f"codebook.decay: {self.decay} is not within [0, 1)")
        require(
            self.revive_every_steps >= 0,
            f"codebook.revive_every_steps: {self.revive_every_steps} is negative",
        )
        require(0 < self.revive_below < 1, f"codebook.revive_below: {self.revive_below} is not within (0, 1)")
        require(
            self.commitment_weight >= 0, f"codebook.commitment_weight: {self.commitment_weight} is negative"
        )


@dataclass(kw_only=True)
class GuideRun(RunConfig):
    """Settings of a training run of the guide, on crops of which each step uses one grid."""

    zero_stages: ClassVar[tuple[int, ...]] = GAN_ZERO_STAGES
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    grids: list[Any] = field(default_factory=lambda: list(SIDES))
    """Grids to train on, drawn per step: tokens per side, or [height, width]. All have the aspect ratio of
    the crops."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = self.data.crop_size
        require(bool(self.grids), "grids: expected at least one, such as grids=[8]")
        for grid in self.all_grids:
            stretch = grid[0] * width / (grid[1] * height)
            require(
                0.9 < stretch < 1.1,
                f"grids: {list(grid)} has another aspect ratio than crops of {height} x {width} px, which "
                "would be distorted: set data.image_size to a multiple of the grid",
            )

    @property
    def all_grids(self) -> list[Grid]:
        """The grids as (height, width)."""
        return [as_grid(grid, "grids") for grid in self.grids]

    @property
    def sampler(self) -> RatioSamplerConfig:
        """The sampler of the image source: every image, without ratios."""
        return RatioSamplerConfig(pool="all", shares={_ANY_RATIO: 1.0})
