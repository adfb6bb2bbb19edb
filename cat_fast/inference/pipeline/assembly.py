"""From what trainings leave to a pipeline: a tokenizer, a generator, and the names of its classes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from cat_fast.complexity import Description, RatioThresholds, default_thresholds, tokens_per_image
from cat_fast.data.latents.format import HEADER, read_json
from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.generator.diffusion import load_schedule
from cat_fast.inference.pipeline.cat_pipeline import CATPipeline
from cat_fast.models.load import load_model
from cat_fast.tokenizer import NestedAutoencoderKL


def assemble(
    tokenizer: NestedAutoencoderKL,
    generator: Path,
    labels: Sequence[str],
    *,
    resolution: int,
    thresholds: RatioThresholds | None = None,
    text_classes: Collection[str] = (),
    face_classes: Collection[str] = (),
    text_encoder: str | None = None,
) -> CATPipeline:
    """The pipeline of trained parts, on the CPU.

    Args:
        tokenizer: whose latents the generator was trained on.
        generator: `model/` of its run, with its scheduler/.
        labels: names of its classes, in order.
        resolution: side of its images in pixels.
        thresholds: from complexity score to ratio; the pair fitted to the scorer if None.
        text_classes, face_classes: labels of classes whose images show text, or faces, and so earn more
            tokens.
        text_encoder: name or folder of the encoder that it was trained with, if with text.

    Raises:
        UserError: the folder holds no generator, parts that do not belong together, flags of classes that
            there are not, or a resolution that makes no whole number of patches.
    """
    for name in (*text_classes, *face_classes):
        if name not in labels:
            raise UserError(f"class {name!r} is none of the {len(labels)} classes, as {labels[0]!r} is")
    model = load_model(DiT, "generator", generator, "cpu")
    for ratio in model.config.ratios:
        tokens_per_image(ratio, resolution, model.config.patch_size)
    return CATPipeline(
        tokenizer,
        model,
        load_schedule(generator / "scheduler"),
        labels,
        thresholds or default_thresholds(),
        resolution=resolution,
        descriptions=[
            Description.from_label(label, label in text_classes, label in face_classes) for label in labels
        ],
        text_encoder=text_encoder,
    )


@dataclass(frozen=True, kw_only=True)
class LatentFacts:
    """What a folder of latents says of the generator that was trained on them."""

    fingerprint: str
    """Of the tokenizer."""
    class_names: list[str]
    resolution: int
    """Side of the images in pixels."""
    thresholds: RatioThresholds | None
    """That chose the ratios, where they were given."""


def read_latent_facts(folder: Path) -> LatentFacts:
    """Raises UserError where there are no latents, or they do not tell."""
    if not (folder / HEADER).is_file():
        raise UserError(
            f"{folder} holds no latents: {HEADER} is missing; "
            "give the folder that was data.latents of the generator's run"
        )
    header = read_json(folder / HEADER)
    thresholds = header.get("thresholds")
    try:
        return LatentFacts(
            fingerprint=header["fingerprint"],
            class_names=header["class_names"],
            resolution=header["resolution"],
            thresholds=RatioThresholds(*thresholds) if thresholds else None,
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / HEADER} does not tell {error}; expected what the encode step writes"
        ) from error
