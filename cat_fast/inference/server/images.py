"""POST /v1/images/reconstructions and /v1/complexity: what an image or a description costs."""

import io
from dataclasses import replace
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from cat_fast.complexity import Description, Score, default_scorer, require_scores
from cat_fast.complexity.contributions import contributions
from cat_fast.complexity.image_score import GivenLabels
from cat_fast.complexity.image_scorers.student.scorer import image_student
from cat_fast.data.images.io import READABLE_FORMATS, decode_image, image_to_tensor, resize_center_crop
from cat_fast.errors import UserError
from cat_fast.generator.flops import forward_flops
from cat_fast.inference.server.errors import ApiError
from cat_fast.inference.server.generation import encode_tensor
from cat_fast.inference.server.service import Service
from cat_fast.inference.server.settings import MAX_IMAGE_PIXELS
from cat_fast.tokenizer.pipeline_config import upcast

_LEAST_EFFECT = 0.05
_SHOWN_EFFECTS = 3


def read_image(data: bytes) -> Image.Image:
    """Return an uploaded image as RGB.

    Raises:
        ApiError: 415 if it is not an image, 400 if it has too many pixels or is cut.
    """
    try:
        with Image.open(io.BytesIO(data), formats=READABLE_FORMATS):
            pass
    except UnidentifiedImageError as error:
        raise ApiError(
            415, "image: not an image in a known format; expected JPEG, PNG or WebP", code="not_an_image",
            param="image",
        ) from error  # fmt: skip
    except Exception:  # damaged in its header: decode_image explains it
        pass
    try:
        return decode_image(data, max_pixels=MAX_IMAGE_PIXELS)
    except UserError as error:
        raise ApiError(400, f"image: {error}", code="invalid_image", param="image") from error


def complexity(service: Service, description: Description, *, explain: bool = False) -> dict[str, Any]:
    """Return score, confidence, reasons, ratio and tokens of a description.

    Args:
        explain: give the effects of words as the reasons of a scorer without its own, which takes one more
            score per word.
    """
    scorer = default_scorer()
    (score,) = require_scores(scorer, [description])
    if explain and not score.reasons:
        score = replace(score, reasons=_effects_in_words(contributions(scorer, description), "word"))
    return _result(service, score, description, scorer.name)


def image_complexity(service: Service, image: Image.Image) -> dict[str, Any]:
    """Return the same of an image without a description; the reasons are effects of its pixels' features."""
    scorer = image_student()
    score, effects = scorer.explain(scorer.prepare(image))
    reasons = f"compared with an average image: {_effects_in_words(effects, 'group of features')}"
    return _result(service, replace(score, reasons=reasons), None, scorer.name)


@torch.no_grad()
def reconstruct(service: Service, image: Image.Image, given: GivenLabels) -> dict[str, Any]:
    """Return an image's complexity and its reconstructions at every ratio.

    Args:
        given: description and flags that the client sent.
    """
    description, error = service.describer.describe(image, given)
    found = (
        image_complexity(service, image)
        if description is None
        else complexity(service, description, explain=True)
    )
    found["description_error"] = error
    pipeline = service.pipeline
    vae: Any = pipeline.vae
    cropped = image_to_tensor(resize_center_crop(image, pipeline.resolution))
    transformer = pipeline.transformer
    flops = forward_flops(getattr(transformer, "_orig_mod", transformer))
    found["reconstructions"] = []
    for ratio in sorted(transformer.config.ratios):
        with service.engine.stages.vae_lock, upcast(vae):
            x = cropped[None].to(vae.device, vae.dtype)
            decoded = vae.decode(vae.encode(x, ratio).latent_dist.mode(), ratio).sample[0].float().cpu()
        squared_error = (decoded.clamp(-1, 1) - cropped).square().mean()
        tokens = service.tokens_of(ratio)
        found["reconstructions"].append(
            {
                "ratio": ratio,
                "tokens": tokens,
                "flops_per_step": flops.of(tokens),
                "psnr": float(10 * torch.log10(4 / squared_error.clamp(min=1e-10))),
                "b64_json": encode_tensor(decoded),
            }
        )
    found["original"] = encode_tensor(cropped)
    chosen, fixed = flops.of(found["tokens"]), flops.of(found["fixed_16x_tokens"])
    found["saved_tokens"] = 1 - found["tokens"] / found["fixed_16x_tokens"]
    found["saved_flops"] = 1 - chosen / fixed
    return found


def _effects_in_words(effects: list[tuple[str, float]], kind: str) -> str:
    """Return what raises and what lowers a score most, such as 'raised by word "crowd" (+0.6)'.

    Args:
        kind: name of one part of the input that has an effect.
    """
    parts = []
    for verb, sign in (("raised", 1), ("lowered", -1)):
        found = [(name, effect) for name, effect in effects if sign * effect >= _LEAST_EFFECT]
        if found:
            shown = ", ".join(f"{name} ({effect:+.1f})" for name, effect in found[:_SHOWN_EFFECTS])
            parts.append(f"{verb} by {shown}")
    return "; ".join(parts) or f"no single {kind} changes it"


def _result(service: Service, score: Score, description: Description | None, scorer: str) -> dict[str, Any]:
    ratio = service.pipeline.nearest_ratio(service.pipeline.thresholds.ratio_of(score))
    return {
        "score": score.score,
        "expected": score.expected,
        "confidence": score.confidence,
        "reasons": score.reasons,
        "description": None if description is None else description.caption,
        "has_text": None if description is None else description.has_text,
        "has_faces": None if description is None else description.has_faces,
        "ratio": ratio,
        "tokens": service.tokens_of(ratio),
        "fixed_16x_tokens": service.tokens_of(16),
        "scorer": scorer,
    }
