"""Cost of scoring a set of images, against the training compute that the saved tokens save.

Times of language models are published ones; those of the distilled scorers are measured by the caller. Saved
compute is proportional to the saved tokens, without the attention, which is quadratic in them:

    saved FLOPs per image and epoch = 3 · FLOPs per token · (256 − mean tokens)

with the forward pass of cat_xl (219.95 GFLOPs for the 256 tokens of a 512 px image at 16x), and twice as much
for the backward pass.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cat_fast.complexity.rated_captions import read_rated
from cat_fast.complexity.score import Scorer
from cat_fast.errors import UserError

FIXED_TOKENS = 256
"""Tokens of an image at a fixed 16x, 512 px."""
PUBLISHED_MEAN_TOKENS = 197.44
"""Mean tokens of the published generator training (ImageNet-512)."""
FORWARD_FLOPS_PER_TOKEN = 219.95e9 / FIXED_TOKENS
TRAINING_PASSES = 3
"""Forward and backward pass, in forward passes."""
PUBLISHED_STEPS, PUBLISHED_TOKENS_PER_STEP, IMAGENET_IMAGES = 400_000, 262_144, 1_281_167

_MEASURED_SECONDS = 1.0
_CALL = 256
"""Captions per call of a scorer that is measured."""
_VLM, _TWO_MODELS, _LLM, _CONFLICTING = 1.63, 1.84, 1.0, 0.05
CONFLICTS = (
    "One table of the paper gives 1.63 to 1.84 s per image for captioning and scoring on an H100, another"
    " about 50 ms for the same step: a factor of 33 or more.",
    "The authors answer that scoring costs < 1 % of the total compute over 1 M steps. By their own figures,"
    " 380 M images at 1.63 s are 172,000 H100-hours, against about 2,400 to 5,900 A100-hours for the"
    " arithmetic of the tokenizer's training.",
)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices and power, all of them assumptions that options replace.

    Raises:
        UserError: a value is not a positive number.
    """

    gpu_hour: float = 2.5
    """Price of an H100-hour."""
    gpu_watts: float = 700.0
    """Power of an H100 SXM by its data sheet."""
    core_hour: float = 0.04
    """Price of an hour of one CPU core."""
    core_watts: float = 6.0
    """Power of one CPU core, its share of a server."""
    peak_tflops: float = 989.0
    """Peak of an H100 SXM in bfloat16 by its data sheet."""
    mfu: float = 0.4
    """Share of the peak that training reaches."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be a positive number, got {value:g}")
        if self.mfu > 1:
            raise UserError(f"mfu must be at most 1, got {self.mfu:g}")


@dataclass(frozen=True)
class ScoringSpeed:
    """Time that a way of scoring takes per image, on one device."""

    name: str
    seconds: float
    device: str
    """One of "gpu" and "core"."""
    source: str
    """Origin of the time."""
    scope: str
    """Input: an image, or a caption that exists already."""


PUBLISHED_SPEEDS = (
    ScoringSpeed("LLaVA, one call", _VLM, "gpu", "published, H100", "image"),
    ScoringSpeed("captioner and LLM", _TWO_MODELS, "gpu", "published, H100", "image"),
    ScoringSpeed("LLM alone", _LLM, "gpu", "published, H100", "caption"),
    ScoringSpeed("by another table", _CONFLICTING, "gpu", "published, conflicting", "image"),
)
CAPTIONING_SECONDS = _TWO_MODELS - _LLM
"""H100-seconds per image that captions cost where there are none, by difference of the published times."""


@dataclass(frozen=True)
class Expense:
    """Time, energy and money."""

    gpu_hours: float
    core_hours: float
    kwh: float
    money: float

    @classmethod
    def of(cls, seconds: float, device: str, prices: Prices) -> "Expense":
        """Return the expense of a time on one device."""
        hours = seconds / 3600
        if device == "gpu":
            return cls(hours, 0.0, hours * prices.gpu_watts / 1000, hours * prices.gpu_hour)
        return cls(0.0, hours, hours * prices.core_watts / 1000, hours * prices.core_hour)


@dataclass(frozen=True)
class ScorerCost:
    """Cost of scoring all images in one way, and what it takes to save as much."""

    speed: ScoringSpeed
    expense: Expense
    epochs_by_money: float
    """Epochs of generator training after which the saved tokens have saved the money; infinite if never."""
    epochs_by_energy: float
    images_by_money: float
    """The same as a number of images drawn in training: epochs times images."""

    def to_json(self) -> dict[str, Any]:
        """Return the cost as JSON values, null for what is infinite."""
        even = {
            "epochs_by_money": self.epochs_by_money,
            "epochs_by_energy": self.epochs_by_energy,
            "images_by_money": self.images_by_money,
        }
        finite = {name: value if math.isfinite(value) else None for name, value in even.items()}
        return vars(self.speed) | vars(self.expense) | finite


@dataclass(frozen=True)
class CostComparison:
    """Costs of all scorers against the saving per epoch."""

    images: int
    mean_tokens: float
    saved_per_epoch: Expense
    costs: list[ScorerCost]

    def to_json(self, prices: Prices) -> dict[str, Any]:
        """Return the comparison as JSON values, with all assumptions; null for a break-even never reached."""
        return {
            "images": self.images,
            "mean_tokens": self.mean_tokens,
            "fixed_16x_tokens": FIXED_TOKENS,
            "assumptions": vars(prices)
            | {"forward_flops_per_token": FORWARD_FLOPS_PER_TOKEN, "training_passes": TRAINING_PASSES},
            "saved_per_epoch": vars(self.saved_per_epoch),
            "published_epochs": published_epochs(),
            "scorers": [cost.to_json() for cost in self.costs],
            "captioning_seconds_per_image": CAPTIONING_SECONDS,
            "conflicts": list(CONFLICTS),
        }


def compare_costs(
    images: int,
    speeds: Sequence[ScoringSpeed],
    prices: Prices,
    mean_tokens: float = PUBLISHED_MEAN_TOKENS,
) -> CostComparison:
    """Return the cost of scoring `images` in each way, and the epochs of training that save as much.

    Args:
        mean_tokens: mean tokens per image that the scores lead to, up to 256.

    Raises:
        UserError: no images, or mean tokens that are not positive and up to 256.
    """
    if images < 1:
        raise UserError(f"expected at least one image, got {images}")
    if not 0 < mean_tokens <= FIXED_TOKENS:
        raise UserError(
            f"mean tokens: expected more than 0 and at most {FIXED_TOKENS}, those of a fixed 16x, got"
            f" {mean_tokens:g}; more tokens save nothing"
        )
    flops = TRAINING_PASSES * FORWARD_FLOPS_PER_TOKEN * (FIXED_TOKENS - mean_tokens)
    saved = Expense.of(images * flops / (prices.peak_tflops * 1e12 * prices.mfu), "gpu", prices)
    costs = []
    for speed in speeds:
        expense = Expense.of(images * speed.seconds, speed.device, prices)
        epochs = _ratio(expense.money, saved.money)
        costs.append(ScorerCost(speed, expense, epochs, _ratio(expense.kwh, saved.kwh), epochs * images))
    return CostComparison(images, mean_tokens, saved, costs)


def measure_speed(name: str, scorer: Scorer) -> ScoringSpeed:
    """Measure the CPU time per caption of a scorer for at least a second, on packaged captions.

    One thread: on a busy machine, threads that wait for each other spend ten times the CPU time.
    """
    descriptions = [rated.description for rated in read_rated()]
    with _one_thread():
        scorer.score_many(descriptions[:_CALL])  # first calls load and compile
        scored, start = 0, time.process_time()
        while (seconds := time.process_time() - start) < _MEASURED_SECONDS:
            first = scored % (len(descriptions) - _CALL)
            scorer.score_many(descriptions[first : first + _CALL])
            scored += _CALL
    return ScoringSpeed(name, seconds / scored, "core", "measured now, on this machine", "caption")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    torch = sys.modules.get("torch")  # not every scorer imports it
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def published_epochs() -> float:
    """Return how often the published generator training draws each image of ImageNet."""
    return PUBLISHED_STEPS * PUBLISHED_TOKENS_PER_STEP / PUBLISHED_MEAN_TOKENS / IMAGENET_IMAGES


def _ratio(cost: float, saved: float) -> float:
    return cost / saved if saved else math.inf
