"""Assembly of a pipeline from trained models: a tokenizer, a transformer and the names of its classes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cat_fast.complexity import RatioThresholds, describe_labels, tokens_per_image
from cat_fast.data.latents.format import HEADER, read_json
from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.generator.diffusion import Schedule, load_schedule, make_schedule
from cat_fast.generator.sampling import Guidance
from cat_fast.generator.text_encoder import TextEncoder
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
    num_inference_steps: int = 250,
    guidance_scale: Guidance = 1.5,
) -> CATPipeline:
    """Build the pipeline of trained models, on the CPU.

    Args:
        tokenizer: encoded the latents that the transformer was trained on.
        generator: `model/` of the transformer's run, with its scheduler/; or a checkpoint of the original
            DiT.
        labels: class names, in order.
        resolution: side of the images in pixels.
        thresholds: map complexity scores to ratios; `default_thresholds()` if None.
        text_classes, face_classes: labels of all classes whose images show text, or faces, and get more
            tokens. Empty: those of ImageNet if all labels are its classes; else unknown, so that the scorer
            infers it from each label.
        text_encoder: name or folder of the text encoder it was trained with, if any.
        num_inference_steps, guidance_scale: defaults of the pipeline's calls.

    Raises:
        UserError: the folder does not hold a trained transformer, models that were not trained together,
            unknown classes, or a resolution that does not divide into patches.
    """
    for name in (*text_classes, *face_classes):
        if name not in labels:
            raise UserError(f"class {name!r} is none of the {len(labels)} classes, such as {labels[0]!r}")
    transformer = load_model(DiT, "generator", generator, "cpu")
    for ratio in transformer.config.ratios:
        tokens_per_image(ratio, resolution, transformer.config.patch_size)
    return CATPipeline(
        tokenizer,
        transformer,
        _schedule_of(transformer, generator),
        None if text_encoder is None else TextEncoder(text_encoder),
        labels=labels,
        thresholds=thresholds,
        resolution=resolution,
        descriptions=[
            replace(
                description,
                has_text=label in text_classes if text_classes else description.has_text,
                has_faces=label in face_classes if face_classes else description.has_faces,
            )
            for label, description in zip(labels, describe_labels(labels), strict=True)
        ],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )


def _schedule_of(transformer: DiT, generator: Path) -> Schedule:
    """Return the noise schedule of a transformer's training: the original's for published weights."""
    if generator.is_file():
        return make_schedule(beta_schedule=transformer.config.beta_schedule)
    return load_schedule(generator / "scheduler")


@dataclass(frozen=True, kw_only=True)
class LatentFacts:
    """Facts in the header of a folder of latents about the transformer trained on them."""

    fingerprint: str
    """Fingerprint of the tokenizer."""
    class_names: list[str]
    resolution: int
    """Side of the images in pixels."""
    thresholds: RatioThresholds | None
    """Thresholds that chose the ratios, if the latents were encoded with any."""


def read_latent_facts(folder: Path) -> LatentFacts:
    """Read the header of a folder of latents.

    Raises:
        UserError: the folder does not hold latents, or its header is incomplete.
    """
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
            f"{folder / HEADER} is incomplete ({error}); expected the header that the encode step writes"
        ) from error
