"""Samples to evaluate, drawn from a pipeline: classes in turn, or the captions of COCO's validation set."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cat_fast.complexity import Description
from cat_fast.errors import UserError
from cat_fast.evaluation.generation.checks import check_scale_recorded
from cat_fast.inference.pipeline.cat_pipeline import CATPipeline
from cat_fast.inference.pipeline.folder import find_folder, pipeline_digest
from cat_fast.inference.sampling_run.run import SampleRun, SampleSettings

COCO_IMAGES = 5_000
_COCO_NOTE = (
    "zero-shot COCO: the first caption of each image. The paper leaves open how its class-conditional model"
    " was prompted; this model is conditioned on text"
)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Samples to draw."""

    pipeline: Path
    count: int = 50_000
    steps: int = 250
    guidance: float = 1.5
    ratio: str = "auto"
    mean_tokens: float | None = None
    seed: int = 0
    coco: Path | None = None
    """COCO's captions_val2017.json; replaces `count`."""


def draw_samples(
    drawing: Drawing,
    out: Path,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any] | None:
    """Draw the missing samples into `out`/images; return entries of the result.

    Returns:
        None if other machines have not drawn all of theirs yet.

    Raises:
        UserError: the pipeline cannot be used, lacks the scale of its latents, or, for COCO, is not
            conditioned on text.
    """
    folder = find_folder(str(drawing.pipeline), {})  # also of "nano", which ships with the package
    _check_scale(folder)
    pipeline = CATPipeline.from_pretrained(folder).to(device)
    prompts: list[Any]
    if drawing.coco is not None:
        if pipeline.text_encoder is None:
            raise UserError(
                f"--coco: {drawing.pipeline} is conditioned on classes only, and the paper does not define"
                " how such a model draws captions; use a pipeline with a text encoder"
            )
        prompts = [Description(caption) for caption in read_first_captions(drawing.coco)]
    else:
        prompts = [index % len(pipeline.labels) for index in range(drawing.count)]
    ratio: Literal["auto"] | int = "auto" if drawing.ratio == "auto" else int(drawing.ratio)
    settings = SampleSettings(
        ratio=ratio,
        mean_tokens=drawing.mean_tokens,
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance,
        seed=drawing.seed,
    )
    run = SampleRun(pipeline, prompts, settings, out, folder)
    done = 0.0

    def on_share(share: float) -> None:
        nonlocal done
        before, done = int(done), done + share
        on_progress("drawing", int(done) - before, len(prompts))

    run.draw(rank, world_size, on_share)
    if run.count_missing():
        return None
    tokens = [request.num_tokens for request in run.requests]
    entries: dict[str, Any] = {
        "pipeline": {
            **{
                key: str(value) if isinstance(value, Path) else value
                for key, value in asdict(drawing).items()
            },
            "digest": pipeline_digest(folder),
            "count": len(prompts),
            "mean_tokens": sum(tokens) / len(tokens),
            "latent_scale": _scale(folder),
        }
    }
    if drawing.coco is not None:
        entries["note"] = _COCO_NOTE
    return entries


def read_first_captions(path: Path) -> list[str]:
    """Return the first caption, by annotation number, of each image of a COCO annotation file.

    Raises:
        UserError: the file is not a COCO caption file, or an image has no caption.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images = sorted(image["id"] for image in content["images"])
        captions: dict[int, str] = {}
        for annotation in sorted(content["annotations"], key=lambda entry: entry["id"]):
            captions.setdefault(annotation["image_id"], annotation["caption"].strip())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected COCO's captions_val2017.json, with images and annotations ({error})"
        ) from error
    missing = [image for image in images if image not in captions]
    if missing or not images:
        raise UserError(f"{path}: image {missing[0]} has no caption" if missing else f"{path}: has no images")
    return [captions[image] for image in images]


def _check_scale(pipeline: Path) -> None:
    config = pipeline / "transformer" / "config.json"
    if config.is_file():
        check_scale_recorded(pipeline, json.loads(config.read_text(encoding="utf-8")))


def _scale(pipeline: Path) -> dict[str, Any]:
    config = json.loads((pipeline / "transformer" / "config.json").read_text(encoding="utf-8"))
    return {name: config[name] for name in ("shift_factor", "scaling_factor")}
