"""Configuration dataclasses of the dual-token tokenizer's training stages."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from cat_fast.data.images.size import height_and_width
from cat_fast.data.sampling.ratio_sampler import RatioSamplerConfig
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.dual_token.grid import SIDES, Grid, as_grid
from cat_fast.errors import UserError
from cat_fast.training.config.deepspeed_json import WHOLE_WEIGHT_STAGES
from cat_fast.training.config.settings import ImageDataConfig, RunConfig, require

ANY_RATIO = 8
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

    zero_stages: ClassVar[tuple[int, ...]] = WHOLE_WEIGHT_STAGES
    checkpoints_gradients: ClassVar[bool] = False
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
        return RatioSamplerConfig(pool="all", shares={ANY_RATIO: 1.0})


@dataclass(kw_only=True)
class PairDataConfig:
    """Image-text pairs."""

    index: str = ""
    """Image index (JSON lines) whose rows all have a caption."""
    shards: str = ""
    """WebDataset archives instead of an index, local or at any URL that fsspec supports, such as
    `s3://bucket/shard-{000000..000499}.tar`. The caption is `KEY.txt`, `caption` in `KEY.json`, or in a
    sidecar file; samples without one are skipped."""
    image: str = ""
    """Image to use of samples of an archive that contain several: an extension such as `input.jpg`."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """Settings for reading, shuffling and decoding archives."""
    held_out: str = ""
    """Index of held-out pairs, for evaluations; empty disables them."""
    image_size: Any = 128
    """Size of the crops in pixels; the ViT sees them resized to its own size."""
    batch_size: int = 64
    """Pairs per step, over all ranks: each image's text competes with those of the complete batch."""
    min_crop: float = 0.8
    """Smallest side of a random crop, as a fraction of the image's short side."""

    def __post_init__(self) -> None:
        require(
            not (self.index and self.shards),
            f"data.index={self.index} and data.shards are both set: remove one, such as data.index=''",
        )
        require(
            not self.image or bool(self.shards),
            f"data.image={self.image}: applies to data.shards only; leave it out",
        )
        require(self.batch_size > 1, f"data.batch_size: {self.batch_size}: expected at least 2 pairs")
        require(0 < self.min_crop <= 1, f"data.min_crop: {self.min_crop} is not within (0, 1]")
        try:
            height_and_width(self.image_size)
        except ValueError as error:
            raise UserError(f"data.image_size: {error}") from error

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of the crops, in pixels."""
        return height_and_width(self.image_size)


@dataclass(kw_only=True)
class SemanticRun(RunConfig):
    """Settings of a stage of the semantic branch.

    `contrastive` trains the causal Q-Former. `codes` starts from its model (`initial_weights`), keeps it
    fixed, and trains the codebook, the code decoder and the reverse Q-Former.
    """

    zero_stages: ClassVar[tuple[int, ...]] = WHOLE_WEIGHT_STAGES
    checkpoints_gradients: ClassVar[bool] = False
    stage: str = "contrastive"
    """`contrastive` or `codes`."""
    data: PairDataConfig = field(default_factory=PairDataConfig)
    text_target: str = "nano"
    """Diffusion model whose text encoder is the text target: a pipeline of this package or its folder, a
    Stable Diffusion folder, or the name of a text encoder."""
    num_states: int = 77
    """Maximum number of text states, for encoders that do not pad their texts."""
    blip2: str = ""
    """Published BLIP-2 to start the contrastive stage from: its folder, or its name in the hub's cache. Its
    sizes replace those of `model`. Empty starts from a random initialisation."""
    train_vision: bool = False
    """Train the ViT in the contrastive stage, too, for runs without a published one."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    cosine_weight: float = 1.0
    """Weight of the cosine similarity of decoded embeddings (equation 7)."""
    state_weight: float = 1.0
    """Weight of the squared error of the text states (equation 8)."""
    length_weight: float = 0.1
    """Weight of the cross-entropy of the number of states, for encoders that do not pad their texts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.stage in ("contrastive", "codes"), f"stage: {self.stage!r} is not contrastive or codes")
        require(
            self.stage == "contrastive" or bool(self.initial_weights),
            "initial_weights: the stage codes starts from the model of the stage contrastive; set its "
            "folder, such as initial_weights=runs/nano_dual_contrastive/model",
        )
        require(
            not (self.blip2 and self.initial_weights),
            "blip2 and initial_weights are both set; remove one",
        )
        require(
            self.accumulation_steps == 1,
            f"accumulation_steps: {self.accumulation_steps}: in-batch negatives need the batch at once; set "
            "it to 1",
        )
        require(self.num_states > 0, f"num_states: {self.num_states} must be positive")
        require(
            self.logging.grid_every_steps == 0,
            "logging.grid_every_steps: the semantic branch draws no images; set it to 0",
        )


@dataclass(kw_only=True)
class LanguageDataConfig:
    """Image-text pairs that a language model learns, as sequences of a dual-token tokenizer."""

    index: str = ""
    """Image index (JSON lines) whose rows all have a caption."""
    held_out: str = ""
    """Index of held-out pairs, for evaluations; empty disables them."""
    tokenizer: str = ""
    """Folder of the dual-token tokenizer that encodes the images, once, at the start."""
    grids: list[Any] = field(default_factory=lambda: [4])
    """Guide sizes of the sequences: tokens per side, or [height, width]. An image has one of them."""
    text_encoder: str = "nano"
    """Encoder of the captions: a pipeline of this package, or the name of a text encoder."""
    max_states: int = 24
    """Maximum number of text states in the prefix."""
    batch_size: int = 16
    """Sequences per step, over all ranks."""
    caption_dropout: float = 0.1
    """Share of sequences that are learned without their caption."""

    def __post_init__(self) -> None:
        require(self.batch_size > 0, f"data.batch_size: {self.batch_size} must be positive")
        require(self.max_states > 0, f"data.max_states: {self.max_states} must be positive")
        require(
            0 <= self.caption_dropout < 1,
            f"data.caption_dropout: {self.caption_dropout} is not within [0, 1)",
        )
        require(bool(self.grids), "data.grids: expected at least one, such as data.grids=[4]")
        _ = self.all_grids  # raises for grids that are not valid

    @property
    def all_grids(self) -> list[Grid]:
        """The grids as (height, width)."""
        return [as_grid(grid, "data.grids") for grid in self.grids]


@dataclass(kw_only=True)
class LanguageRun(RunConfig):
    """Settings of a training run of the language model over flat sequences."""

    zero_stages: ClassVar[tuple[int, ...]] = WHOLE_WEIGHT_STAGES
    checkpoints_gradients: ClassVar[bool] = False
    data: LanguageDataConfig = field(default_factory=LanguageDataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.accumulation_steps == 1,
            f"accumulation_steps: {self.accumulation_steps}: raise data.batch_size instead; set it to 1",
        )
        require(
            self.logging.grid_every_steps == 0,
            "logging.grid_every_steps: use `cat-fast dual generate` for sheets; set it to 0",
        )
