"""Samples of the text generator for fixed prompts: recognition, and nearest training images."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.nano.emoji_classifier import Trained
from cat_fast.data.images.contact_sheet import Cell, contact_sheet
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.images.io import image_to_tensor, load_image
from cat_fast.generator.sampling import Guidance
from cat_fast.inference import CATPipeline

PROMPTS = Path(__file__).with_name("prompts.json")
SCALES = (1.5, 2.5, 4.0, 6.0)
"""Guidance scales to choose from, per ratio."""
STEPS = (10, 20, 40)
"""Numbers of steps to choose from."""
TRIAL_PROMPTS, TRIAL_STEPS = 48, 20
ENDING = ", emoji"
"""Ending of captions that prompts omit."""
TOP = 5
COLUMNS = 10
_NEAR_SIDE = 32
"""Side at which samples and training images are compared, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The fixed prompts: captions of training images by kind, and recombinations that are none."""

    captions: dict[str, list[str]]
    recombined: list[str]

    @classmethod
    def load(cls) -> "Prompts":
        """Read them from prompts.json."""
        return cls(**json.loads(PROMPTS.read_text(encoding="utf-8")))

    @property
    def trained(self) -> list[str]:
        """All captions, in order."""
        return [caption for kind in self.captions.values() for caption in kind]

    @property
    def all(self) -> list[str]:
        return [*self.trained, *self.recombined]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples of a list of prompts, the first seed each."""

    prompts: list[str]
    images: Tensor
    """(N, 3, H, W) in [-1, 1]."""
    ratios: list[int]
    tokens: list[int]


@torch.no_grad()
def draw(
    pipeline: CATPipeline,
    prompts: Sequence[str],
    *,
    ratio: int | None = None,
    mean_tokens: float | None = None,
    steps: int,
    guidance: Guidance,
) -> Drawn:
    """Draw one image per prompt, image i from seed i, at one ratio or within a budget of tokens."""
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        list(prompts),
        ratio="auto" if ratio is None else ratio,
        mean_tokens=mean_tokens,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        output_type="pt",
    )
    return Drawn(
        prompts=list(prompts), images=output.images * 2 - 1, ratios=output.ratios, tokens=output.tokens
    )


@dataclass(frozen=True)
class Sampling:
    """Guidance scale per ratio and number of steps."""

    guidance: dict[int, float]
    steps: int


def choose_sampling(
    pipeline: CATPipeline, classifier: Trained, prompts: Prompts
) -> tuple[Sampling, dict[str, Any]]:
    """Choose the guidance scale per ratio, then the number of steps, by recognised samples.

    The prompts are other classes of the classifier than the fixed prompts, so that these are not selected on.
    Of equal scales the smallest is chosen; of the numbers of steps, the smallest that reaches 95 % of the
    most recognised.

    Returns:
        The choice, and the trial as JSON.
    """
    others = [caption for caption in classifier.captions if caption not in set(prompts.trained)]
    trial = [others[i] for i in np.linspace(0, len(others) - 1, TRIAL_PROMPTS).round().astype(int)]

    def count(ratio: int, steps: int, scale: float) -> int:
        drawn = draw(pipeline, trial, ratio=ratio, steps=steps, guidance=scale)
        return recognised(drawn, classifier, len(trial))["recognised"]

    by_scale: dict[str, dict[str, int]] = {}
    by_steps: dict[str, dict[str, int]] = {}
    guidance: dict[int, float] = {}
    totals = dict.fromkeys(STEPS, 0)
    for ratio in sorted(pipeline.transformer.config.ratios):
        counts = {scale: count(ratio, TRIAL_STEPS, scale) for scale in SCALES}
        best = guidance[ratio] = max(counts, key=lambda scale: counts[scale])
        of_steps = {n: counts[best] if n == TRIAL_STEPS else count(ratio, n, best) for n in STEPS}
        totals = {n: total + of_steps[n] for n, total in totals.items()}
        by_scale[f"{ratio}x"] = {f"{scale:g}": found for scale, found in counts.items()}
        by_steps[f"{ratio}x"] = {str(n): found for n, found in of_steps.items()}
    steps = min(n for n, total in totals.items() if total >= 0.95 * max(totals.values()))
    return Sampling(guidance, steps), {
        "prompts": len(trial),
        "recognised by guidance scale": by_scale,
        "recognised by steps": by_steps,
        "guidance": {str(ratio): scale for ratio, scale in guidance.items()},
        "steps": steps,
    }


def recognised(drawn: Drawn, classifier: Trained, count: int) -> dict[str, Any]:
    """Return the number of the first `count` samples whose prompt is among the classifier's top 5.

    Chance is measured by shuffled prompts: the mean over all rotations of the list.
    """
    tops = classifier.top(drawn.images[:count], TOP)
    hits = [prompt in top for prompt, top in zip(drawn.prompts, tops, strict=False)]
    shuffled = [
        np.mean([drawn.prompts[(i + shift) % count] in tops[i] for i in range(count)])
        for shift in range(1, count)
    ]
    return {
        "prompts": count,
        "recognised": sum(hits),
        "top1": sum(prompt == top[0] for prompt, top in zip(drawn.prompts, tops, strict=False)),
        "shuffled": float(np.mean(shuffled)) * count,
        "mean_tokens": float(np.mean(drawn.tokens[:count])),
        "found": dict(zip(drawn.prompts, hits, strict=False)),
    }


def load_renderings(records: Sequence[ImageRecord]) -> Tensor:
    """Return the images of records, (N, 3, H, W) in [-1, 1]."""
    return torch.stack([image_to_tensor(load_image(record.path)) for record in records])


@dataclass(frozen=True)
class Nearest:
    """The training image nearest to a sample."""

    index: int
    distance: float
    """Root mean square difference at 32 px, images in [0, 1]."""
    is_copy: bool
    """True if the distance is at most that of the training image's own reconstruction, plus a quarter."""


@torch.no_grad()
def find_nearest(images: Tensor, training: Tensor, reconstruct: Callable[[Tensor], Tensor]) -> list[Nearest]:
    """Return the nearest training image of each sample.

    Args:
        reconstruct: encodes and decodes training images, to measure how far the tokenizer moves them.
    """
    distances = torch.cdist(_near(images), _near(training)) / np.sqrt(3) / _NEAR_SIDE
    found = distances.min(1)
    originals = training[found.indices]
    own = reconstruction_distances(originals, reconstruct(originals))
    return [
        Nearest(index, float(distance), float(distance) <= 1.25 * limit)
        for index, distance, limit in zip(found.indices.tolist(), found.values, own, strict=True)
    ]


def reconstruction_distances(originals: Tensor, reconstructions: Tensor) -> list[float]:
    """Return the distance of each image from its reconstruction, as `find_nearest` measures it."""
    difference = _near(originals) - _near(reconstructions)
    return (difference.square().mean(1).sqrt()).tolist()


def sample_sheet(
    drawn: Drawn, nearest: Sequence[Nearest], training: Sequence[ImageRecord], found: Mapping[str, bool]
) -> Image.Image:
    """Draw all samples with their prompts, and each with its nearest training image below it.

    Args:
        found: by prompt, True if it is in the classifier's top 5; other prompts are not classes.
    """
    verdicts = {True: "in the top 5", False: "not in the top 5", None: "never a caption"}
    rows: list[list[Cell]] = []
    for start in range(0, len(drawn.prompts), COLUMNS):
        members = range(start, min(start + COLUMNS, len(drawn.prompts)))
        rows.append(
            [
                Cell(
                    _opener(drawn.images[i]),
                    [*_wrap(drawn.prompts[i]), verdicts[found.get(drawn.prompts[i])]],
                )
                for i in members
            ]
        )
        rows.append(
            [
                Cell(
                    lambda path=training[nearest[i].index].path: load_image(path),  # type: ignore[misc]
                    [f"nearest, {nearest[i].distance:.3f}", "a copy" if nearest[i].is_copy else ""],
                )
                for i in members
            ]
        )
    labels = [("sample",), ("training",)] * (len(rows) // 2)
    return contact_sheet(rows, title="first seed of each prompt, no selection", labels=labels, max_cell=128)


def _near(images: Tensor) -> Tensor:
    small = F.interpolate(images.clamp(-1, 1), size=(_NEAR_SIDE, _NEAR_SIDE), mode="bilinear", antialias=True)
    return (small / 2 + 0.5).flatten(1)


def _opener(image: Tensor) -> Any:
    pixels = ((image.clamp(-1, 1) / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
    return lambda: Image.fromarray(pixels)


def _wrap(text: str, width: int = 18) -> tuple[str, str]:
    """Split a prompt into two lines."""
    if len(text) <= width:
        return text, ""
    cut = text.rfind(" ", 0, width + 1)
    return (text[:cut], text[cut + 1 :]) if cut > 0 else (text[:width], text[width:])
