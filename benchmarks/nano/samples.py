"""Samples of the text generator for fixed prompts: recognition, and nearest training images."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.nano.emoji_classifier import CLASSES, Trained
from cat_fast.data.images.contact_sheet import Cell, contact_sheet
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.images.io import image_to_tensor, load_image
from cat_fast.generator.sampling import Guidance
from cat_fast.inference import CATPipeline

PROMPTS = Path(__file__).with_name("prompts.json")
STEPS = 50
SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)
"""Guidance scales to choose from, per ratio."""
TRIAL_PROMPTS, TRIAL_STEPS = 60, 20
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
    steps: int = STEPS,
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


def choose_guidance(pipeline: CATPipeline, classifier: Trained, prompts: Prompts) -> dict[str, Any]:
    """Return the number of recognised samples per ratio and guidance scale, and the best scale per ratio.

    The prompts are other classes of the classifier than the fixed prompts, so that these are not selected on.
    """
    others = [caption for caption in classifier.captions if caption not in set(prompts.trained)]
    trial = [others[i] for i in np.linspace(0, len(others) - 1, TRIAL_PROMPTS).round().astype(int)]
    found: dict[str, dict[str, int]] = {}
    best: dict[int, float] = {}
    for ratio in sorted(pipeline.transformer.config.ratios):
        counts = {
            scale: recognised(
                draw(pipeline, trial, ratio=ratio, steps=TRIAL_STEPS, guidance=scale), classifier, len(trial)
            )["recognised"]
            for scale in SCALES
        }
        best[ratio] = max(counts, key=lambda scale: counts[scale])
        found[f"{ratio}x"] = {f"{scale:g}": count for scale, count in counts.items()}
    return {"prompts": len(trial), "recognised": found, "chosen": best}


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


def choose_classes(captions: Sequence[str], needed: Sequence[str]) -> list[int]:
    """Return the indices of the classifier's classes: all prompts, and others evenly spaced."""
    index = {caption: i for i, caption in enumerate(captions)}
    chosen = [index[prompt] for prompt in needed]
    others = [i for i in range(len(captions)) if i not in set(chosen)]
    spaced = np.linspace(0, len(others) - 1, CLASSES - len(chosen)).round().astype(int)
    return [*chosen, *(others[i] for i in spaced)]


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


def sample_sheet(drawn: Drawn, nearest: Sequence[Nearest], training: Sequence[ImageRecord]) -> Image.Image:
    """Draw all samples with their prompts, and each with its nearest training image below it."""
    rows: list[list[Cell]] = []
    for start in range(0, len(drawn.prompts), COLUMNS):
        members = range(start, min(start + COLUMNS, len(drawn.prompts)))
        rows.append([Cell(_opener(drawn.images[i]), [*_wrap(drawn.prompts[i])]) for i in members])
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
