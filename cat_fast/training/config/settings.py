"""What a training run is told: one dataclass a section of its YAML file, checked when it is made."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cat_fast.complexity.image_ratios import PHOTOGRAPHS, RATIO_SIGNALS
from cat_fast.data.sampling.ratio_sampler import RatioSamplerConfig
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.errors import UserError
from cat_fast.generator.diffusion import PREDICTIONS, WEIGHTINGS
from cat_fast.tokenizer.losses import LossConfig
from cat_fast.training.config.deepspeed_json import (
    GAN_ZERO_STAGES,
    PRECISIONS,
    ZERO_STAGES,
    read_deepspeed_config,
)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW; `max_grad_norm` is the global gradient norm to clip to."""

    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.1
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optimizer.lr: {self.lr} must be positive")
        require(len(self.betas) == 2, f"optimizer.betas: two numbers expected, got {self.betas}")
        require(self.max_grad_norm > 0, f"optimizer.max_grad_norm: {self.max_grad_norm} must be positive")


@dataclass(kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then `constant`, or `cosine` down to `min_ratio` of the rate at `total_steps`."""

    total_steps: int = 1000
    warmup_steps: int = 0
    kind: str = "constant"
    min_ratio: float = 0.05

    def __post_init__(self) -> None:
        require(self.total_steps > 0, f"schedule.total_steps: {self.total_steps} must be positive")
        require(self.warmup_steps >= 0, f"schedule.warmup_steps: {self.warmup_steps} is negative")
        require(
            self.kind in ("constant", "cosine"), f"schedule.kind: {self.kind!r} is not constant or cosine"
        )
        require(0 <= self.min_ratio <= 1, f"schedule.min_ratio: {self.min_ratio} is not within 0..1")


@dataclass(kw_only=True)
class CheckpointConfig:
    """Every how many steps a checkpoint is written, how many are kept, and whether a rerun goes on."""

    every_steps: int = 1000
    keep_last: int = 2
    resume: str = "auto"
    """`auto` goes on from the newest whole checkpoint; `never` starts over and moves what was there aside."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, f"checkpoint.every_steps: {self.every_steps} must be positive")
        require(self.keep_last > 0, f"checkpoint.keep_last: {self.keep_last} must be positive")
        require(self.resume in ("auto", "never"), f"checkpoint.resume: {self.resume!r} is not auto or never")


@dataclass(kw_only=True)
class GuardConfig:
    """Steps whose loss or gradient is not finite are skipped."""

    max_bad_steps: int = 20
    """How many in a row end the run."""

    def __post_init__(self) -> None:
        require(self.max_bad_steps > 0, f"guard.max_bad_steps: {self.max_bad_steps} must be positive")


@dataclass(kw_only=True)
class WatchdogConfig:
    """A run that hangs is ended with every rank's stack."""

    timeout_seconds: float = 480.0
    """Longest time without a finished step, checkpoint or export; 0 waits for ever. Below the ten minutes
    after which NCCL's process groups give up by themselves, without saying who was missing."""

    def __post_init__(self) -> None:
        require(self.timeout_seconds >= 0, f"watchdog.timeout_seconds: {self.timeout_seconds} is negative")


@dataclass(kw_only=True)
class SlowRanksConfig:
    """Ranks that hold up the others are named."""

    every_steps: int = 50
    """Steps over which a rank's own time is averaged before ranks are compared."""
    factor: float = 1.5
    """How many times the median of the others' own time makes a rank slow."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, f"slow_ranks.every_steps: {self.every_steps} must be positive")
        require(self.factor > 1, f"slow_ranks.factor: {self.factor} must be above 1")


@dataclass(kw_only=True)
class LoggingConfig:
    """What a run tells, and how often; every step's figures go to metrics.jsonl in any case."""

    every_steps: int = 50
    """Where no terminal shows the progress bar, a line is printed every so many steps …"""
    every_seconds: float = 60.0
    """… or after so many seconds, whichever is sooner."""
    scalars_every_steps: int = 1
    """TensorBoard and wandb are given the figures of every so many steps."""
    grid_every_steps: int = 0
    """Reconstructions of a few held-out images at every ratio, every so many steps; 0 is never."""
    grid_columns: int = 4
    """Number of images in a grid."""
    wandb_project: str = ""
    """Also tell Weights & Biases, under this project; WANDB_MODE=offline keeps it on this machine."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "scalars_every_steps", "grid_columns"):
            require(getattr(self, name) > 0, f"logging.{name}: {getattr(self, name)} must be positive")
        require(self.every_seconds > 0, f"logging.every_seconds: {self.every_seconds} must be positive")
        require(self.grid_every_steps >= 0, f"logging.grid_every_steps: {self.grid_every_steps} is negative")
        require(
            not self.wandb_project or importlib.util.find_spec("wandb") is not None,
            "logging.wandb_project is set, but wandb is not installed: pip install 'cat-fast[wandb]', or "
            "leave the key out",
        )


@dataclass(kw_only=True)
class RunConfig:
    """What every run has; the tasks add their own sections."""

    zero_stages: ClassVar[tuple[int, ...]] = ZERO_STAGES
    task: str
    output_dir: str
    seed: int = 0
    ema_decay: float = 0.999
    world_size: int = 0
    """The ranks that a preset is made for, which a run then insists on; 0 is any number."""
    deepspeed: str = "deepspeed/zero2.json"
    """A DeepSpeed JSON file, looked up beside the working folder, then among the packaged configs."""
    precision: str = "fp32"
    """`bf16`: autocast in the model's forward pass; weights, losses and the discriminator stay fp32."""
    accumulation_steps: int = 1
    """Batches a rank goes through in each step; the gradients' mean over them and over ranks is applied."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block for the backward pass, which computes the rest again."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's constructor."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    slow_ranks: SlowRanksConfig = field(default_factory=SlowRanksConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        require(0 <= self.ema_decay < 1, f"ema_decay: {self.ema_decay} is not within [0, 1)")
        require(self.world_size >= 0, f"world_size: {self.world_size} is negative")
        require(bool(self.output_dir), "output_dir: where should the run be written?")
        known = f"is not {' or '.join(PRECISIONS)}"
        require(self.precision in PRECISIONS, f"precision: {self.precision!r} {known}")
        require(
            self.accumulation_steps > 0, f"accumulation_steps: {self.accumulation_steps} must be positive"
        )
        read_deepspeed_config(self.deepspeed, self.zero_stages)


HELD_OUT_SHARE = 1e-3
"""Default share of a data set that reconstruction grids keep for themselves."""


@dataclass(kw_only=True)
class ImageDataConfig:
    """Images and how a rank's batch is drawn from them."""

    index: str = "photographs"
    """An image index (JSON lines), or `photographs` for the training split of the images that ship, which
    give way where shards, a folder or a dataset are named."""
    in_memory: bool = True
    """Whether the index is held in memory, with its images decoded as far as `cache_megabytes` allows; if
    not, both are read as needed."""
    cache_megabytes: int = 4096
    """Memory per rank for decoded images of an index in memory; images without room are decoded by the
    workers whenever they are drawn."""
    shards: str = ""
    """Webdataset archives with their scores beside them, local or anywhere fsspec reaches:
    `s3://bucket/shard-{000000..037999}.tar`, `folder/*.tar`, a folder, or several joined by `::`."""
    folder: str = ""
    """A folder of images. Nothing is known of them: `ratios_from: jpeg`, or `sampler.pool: all`."""
    dataset: str = ""
    """A Hugging Face dataset, on the Hub or in a local folder, streamed."""
    dataset_config: str = ""
    dataset_split: str = "train"
    image: str = ""
    """Image to use of samples that contain several: a column of `dataset`, or an extension in `shards`, such
    as `input.jpg`."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """Reading, shuffling and decoding."""
    ratios_from: str = "index"
    """What chooses an image's ratio: `index`, the ratio in its line of the index or sidecar; `score`, its
    score by `thresholds`; or `jpeg`, its size as a JPEG by the published borders (counted when the run
    starts, or when a stream reads it)."""
    thresholds: list[int] = field(default_factory=lambda: [4, 7])
    """Scores up to the first get 32x, above the second 8x; with `ratios_from: score`."""
    image_size: int = 128
    """Side of the square crops, in pixels."""
    batch_size: int = 4
    """Crops a rank sees in a step, all at one ratio."""
    min_crop: float = 0.25
    """Smallest side of a random crop, as a share of the image's short side."""
    max_side: int = 512
    """Images of an index in memory are shrunk until their short side has at most this many pixels."""
    colour_jitter: float = 0.0
    """Strength of random changes of colour; for sets of a few dozen images."""
    held_out: str = ""
    """A folder or image index (.jsonl) of images that are not among the above, for reconstruction grids.
    Empty takes the held-out photographs where the training split of those that ship is trained on."""
    held_out_share: float | None = None
    """Share of the images above that are kept out of training and shown in grids, chosen by a hash of seed
    and key. Default: 0.001; 0 with `held_out` and for the shipped photographs, which have a held-out split."""

    @property
    def share_held_out(self) -> float:
        """Share of the run's own images to keep out of training, in [0, 1)."""
        if self.held_out_share is not None:
            return self.held_out_share
        return 0.0 if self.held_out or self.shipped else HELD_OUT_SHARE

    @property
    def shipped(self) -> bool:
        """True for the training split of the photographs that ship with the package."""
        return not self.streamed and self.index == PHOTOGRAPHS

    @property
    def streamed(self) -> list[str]:
        """The names of the settings, other than `index`, that name images."""
        return [name for name in ("shards", "folder", "dataset") if getattr(self, name)]

    @property
    def held(self) -> bool:
        """Whether the images are those of an index in memory."""
        return self.in_memory and not self.streamed

    def __post_init__(self) -> None:
        require(
            self.ratios_from in RATIO_SIGNALS,
            f"data.ratios_from: {self.ratios_from!r} is not {', '.join(RATIO_SIGNALS)}",
        )
        streamed = self.streamed
        require(
            bool(streamed or self.index),
            "data: where are the images? Set data.index, data.shards, data.folder or data.dataset",
        )
        require(
            len(streamed) < 2,
            f"data.{' and data.'.join(streamed)} are set, and images come from one of them",
        )
        require(
            not streamed or self.index in ("", PHOTOGRAPHS),
            f"data.index names {self.index}, and data.{''.join(streamed)} is set too: leave one out, as with "
            f"data.{''.join(streamed)}=''",
        )
        require(
            not self.image or bool(self.shards or self.dataset),
            f"data.image={self.image}: applies to data.shards and data.dataset only; leave it out",
        )
        require(len(self.thresholds) == 2, f"data.thresholds: two scores expected, got {self.thresholds}")
        require(self.cache_megabytes > 0, f"data.cache_megabytes: {self.cache_megabytes} must be positive")
        require(self.max_side > 0, f"data.max_side: {self.max_side} must be positive")
        require(self.image_size > 0, f"data.image_size: {self.image_size} must be positive")
        require(self.batch_size > 0, f"data.batch_size: {self.batch_size} must be positive")
        require(0 < self.min_crop <= 1, f"data.min_crop: {self.min_crop} is not within (0, 1]")
        require(
            0 <= self.share_held_out < 1, f"data.held_out_share: {self.held_out_share} is not within [0, 1)"
        )
        require(
            not (self.held_out_share and self.shipped),
            "data.held_out_share: the photographs that ship have held-out ones already; leave it out",
        )
        require(
            not (self.held_out and self.held_out_share),
            "data.held_out and data.held_out_share are set, and grids show one of them; leave one out",
        )
        require(0 <= self.colour_jitter < 1, f"data.colour_jitter: {self.colour_jitter} is not within [0, 1)")


@dataclass(kw_only=True)
class DiscriminatorConfig:
    """The patch discriminator, and its own optimiser."""

    pretrained: str = ""
    """A published StyleGAN2-ADA pickle to start from; it sets the sizes below."""
    resolution: int = 256
    channel_base: int = 32768
    channel_max: int = 512
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(kw_only=True)
class TokenizerRun(RunConfig):
    """A run of the nested VAE."""

    zero_stages: ClassVar[tuple[int, ...]] = GAN_ZERO_STAGES
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    sampler: RatioSamplerConfig = field(default_factory=RatioSamplerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    perceptual_crop: int = 0
    """Side of the random window the perceptual term looks at; 0 for the whole image."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


@dataclass(kw_only=True)
class LatentDataConfig:
    """Latent shards and the token budget."""

    latents: str = ""
    """Folder of latent shards written by one tokenizer."""
    tokenizer: str = ""
    """Folder of the tokenizer that they must be of, if named; a run refuses latents of another."""
    normalized: bool = True
    """Each channel of the latents gets mean 0 and deviation 1 over the data set; False leaves them as the
    tokenizer gives them, which is the paper's scaling factor of 1."""
    max_tokens: int = 16384
    """Token budget of a rank's batch."""
    global_tokens: int = 0
    """Token budget of a step of all ranks, which then sets `accumulation_steps`; 0 leaves it to that key."""
    window: int = 256
    """How many latents a rank the packer may look ahead; some dozens more than a batch holds fill it best."""

    def __post_init__(self) -> None:
        require(self.max_tokens > 0, f"data.max_tokens: {self.max_tokens} must be positive")
        require(self.global_tokens >= 0, f"data.global_tokens: {self.global_tokens} is negative")


@dataclass(kw_only=True)
class DiffusionLossConfig:
    """What the diffusion transformer learns; see `cat_fast.generator.diffusion`."""

    prediction: str = "epsilon"
    """`epsilon`, the noise, as in the paper; `v_prediction`; or `flow`, rectified flow."""
    weighting: str = "token"
    """Whether a `token` or an `image` weighs the same whatever its image's size."""
    min_snr_gamma: float = 0.0
    """Noise levels with a signal-to-noise ratio above it count less; 0 is off, 5 is what is published."""

    def __post_init__(self) -> None:
        for name, known in (("prediction", PREDICTIONS), ("weighting", WEIGHTINGS)):
            given = getattr(self, name)
            require(given in known, f"loss.{name}: {given!r} is not {', '.join(known)}")
        require(self.min_snr_gamma >= 0, f"loss.min_snr_gamma: {self.min_snr_gamma} is negative")
        require(
            not (self.min_snr_gamma and self.prediction == "flow"),
            "loss.min_snr_gamma: a flow has no such weight; 0 is expected with prediction: flow",
        )


@dataclass(kw_only=True)
class GeneratorRun(RunConfig):
    """A run of the diffusion transformer on packed latents."""

    data: LatentDataConfig = field(default_factory=LatentDataConfig)
    loss: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    text_encoder: str = ""
    """A transformers model, by folder or name, whose frozen states tell captions beside classes.
    Empty is class-conditional, as in the paper."""
    text_cache_megabytes: int = 1024
    """Host memory per rank for the states of captions, each of which is then encoded once. With 0, or where
    the states of all captions of the latents do not fit, each step encodes its captions in one batch."""
    compile: bool = False
    """Whether torch.compile makes kernels of the model: a minute at the start, and not again when the lengths
    in a batch change."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.data.global_tokens and self.accumulation_steps > 1),
            "accumulation_steps and data.global_tokens both say how many batches a step holds; leave one out",
        )
        require(
            self.text_cache_megabytes >= 0, f"text_cache_megabytes: {self.text_cache_megabytes} is negative"
        )
        require(
            self.logging.grid_every_steps == 0,
            "logging.grid_every_steps: a generator's run has no tokenizer to draw with; 0 is expected",
        )
        stage = read_deepspeed_config(self.deepspeed).get("zero_optimization", {}).get("stage", 0)
        require(
            not (self.compile and stage == 3),
            "compile: ZeRO 3 gathers weights while the model runs, which torch.compile cannot see; use "
            "deepspeed/zero1.json or zero2.json, or leave compile out",
        )


RUNS: dict[str, type[RunConfig]] = {"tokenizer": TokenizerRun, "generator": GeneratorRun}
