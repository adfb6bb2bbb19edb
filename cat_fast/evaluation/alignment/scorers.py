"""Preference models: PickScore, HPSv2 and ImageReward. None ships with this package or is downloaded.

| name | weights | package |
|---|---|---|
| `pickscore` | folder of yuvalkirstain/PickScore_v1, with the processor of its CLIP | transformers |
| `hpsv2` | file HPS_v2_compressed.pt or HPS_v2.1_compressed.pt | hpsv2 |
| `imagereward` | folder with ImageReward.pt and med_config.json | image-reward |
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image

from cat_fast.errors import UserError, first_line
from cat_fast.generator.text_encoder import no_progress_bars
from cat_fast.models.device import find_device


class AlignmentScorer(Protocol):
    """A model that scores how well images agree with captions."""

    name: str

    def score(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        """Return a score per image and its caption; higher is better."""
        ...


class PickScore:
    """CLIP, fine-tuned on preferences: cosine similarity times the learned logit scale.

    Raises:
        UserError: the folder is not a CLIP with its processor.
    """

    name = "PickScore"

    def __init__(self, weights: Path, device: str) -> None:
        from transformers import AutoProcessor, CLIPModel

        try:
            with no_progress_bars():
                model: Any = CLIPModel.from_pretrained(weights, use_safetensors=True)
            self.processor: Any = AutoProcessor.from_pretrained(weights)
        except (OSError, ValueError) as error:
            raise UserError(
                f"pickscore={weights}: cannot be loaded ({first_line(error)}); expected the folder of "
                "yuvalkirstain/PickScore_v1 with preprocessor_config.json and tokenizer of "
                "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
            ) from error
        self.model = model.to(find_device(device)).eval()

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        inputs = self.processor(
            text=list(captions),
            images=list(images),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model(**inputs)
        similarity = (F.normalize(output.image_embeds) * F.normalize(output.text_embeds)).sum(1)
        return (self.model.logit_scale.exp() * similarity).tolist()


class HPSv2:
    """Human Preference Score v2, through its authors' package."""

    name = "HPSv2"

    def __init__(self, weights: Path, device: str) -> None:
        if not weights.is_file():
            raise UserError(f"hpsv2={weights}: no such file; expected HPS_v2.1_compressed.pt")
        try:
            package: Any = importlib.import_module("hpsv2.img_score")
        except ImportError as error:
            raise UserError("hpsv2: the package is missing: pip install hpsv2") from error
        package.device = str(
            find_device(device)
        )  # a variable of the module, by default a GPU if there is one
        self._score, self.weights = package.score, weights

    def score(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        pairs = zip(images, captions, strict=True)
        return [float(self._score([image], caption, cp=str(self.weights))[0]) for image, caption in pairs]


class ImageReward:
    """ImageReward, through its authors' package."""

    name = "ImageReward"

    def __init__(self, weights: Path, device: str) -> None:
        for name in ("ImageReward.pt", "med_config.json"):
            if not (weights / name).is_file():
                raise UserError(
                    f"imagereward={weights}: {name} is missing; expected the folder of its weights"
                )
        try:
            import ImageReward as package
        except ImportError as error:
            raise UserError("imagereward: the package is missing: pip install image-reward") from error
        try:
            self.model: Any = package.load(
                str(weights / "ImageReward.pt"),
                device=str(find_device(device)),
                med_config=str(weights / "med_config.json"),
            )
        except Exception as error:  # damaged files raise many types
            raise UserError(f"imagereward={weights}: cannot be loaded ({first_line(error)})") from error

    def score(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        pairs = zip(images, captions, strict=True)
        return [float(self.model.score(caption, image)) for image, caption in pairs]


_SCORERS: dict[str, Callable[[Path, str], AlignmentScorer]] = {
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "imagereward": ImageReward,
}


def open_scorer(spec: str, device: str = "auto") -> AlignmentScorer:
    """Return the scorer of `NAME=WEIGHTS`.

    Raises:
        UserError: an unknown name, or weights or a package that are missing.
    """
    name, separator, weights = spec.partition("=")
    if name not in _SCORERS or not separator or not weights:
        raise UserError(f"scorer {spec!r}: expected NAME=WEIGHTS with a name of {', '.join(_SCORERS)}")
    return _SCORERS[name](Path(weights), device)
