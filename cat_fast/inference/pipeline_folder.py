"""A pipeline on disk: tokenizer/, generator/, scheduler/ and, written last, pipeline.json."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cat_fast.complexity import Description, RatioThresholds
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.generator.diffusion import load_schedule
from cat_fast.models.load import load_model, load_tokenizer

if TYPE_CHECKING:
    from cat_fast.inference.pipeline import CATPipeline

SETTINGS = "pipeline.json"
TOKENIZER, GENERATOR, SCHEDULER = "tokenizer", "generator", "scheduler"


def save_pipeline(pipeline: "CATPipeline", folder: Path) -> None:
    """Raises UserError where nothing can be written."""
    require_writable(folder / SETTINGS)
    # without it a half-written folder is not taken for a pipeline
    (folder / SETTINGS).unlink(missing_ok=True)
    pipeline.tokenizer.save_pretrained(folder / TOKENIZER)
    pipeline.generator.save_pretrained(folder / GENERATOR)
    pipeline.scheduler.save_pretrained(folder / SCHEDULER)
    encoder = pipeline.text_encoder
    settings = {
        "labels": pipeline.labels,
        "descriptions": [asdict(description) for description in pipeline.descriptions],
        "thresholds": [pipeline.thresholds.a, pipeline.thresholds.b],
        "resolution": pipeline.resolution,
        "text_encoder": None if encoder is None else encoder.name,
        "text_encoder_fingerprint": None if encoder is None else encoder.fingerprint(),
    }
    with atomic_write(folder / SETTINGS) as part:
        part.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


def load_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of the `CATPipeline` that was saved; nobody outside is asked for them.

    Raises:
        UserError: the folder is no whole pipeline.
    """
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"{folder} is no pipeline: {SETTINGS} is missing; give a folder that a run has finished"
        )
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return {
            "tokenizer": load_tokenizer(folder / TOKENIZER, "cpu"),
            "generator": load_model(DiT, "generator", folder / GENERATOR, "cpu"),
            "scheduler": load_schedule(folder / SCHEDULER),
            "labels": list(settings["labels"]),
            "thresholds": RatioThresholds(*settings["thresholds"]),
            "resolution": int(settings["resolution"]),
            "descriptions": [Description(**description) for description in settings["descriptions"]],
            "text_encoder": settings.get("text_encoder"),
            "text_encoder_fingerprint": settings.get("text_encoder_fingerprint"),
        }
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no whole pipeline: {error}") from error


def pipeline_digest(folder: Path) -> str:
    """16 hex digits that change with any file of a pipeline, and with nothing else in its folder."""
    parts = [path for part in (TOKENIZER, GENERATOR, SCHEDULER) for path in (folder / part).iterdir()]
    digest = hashlib.sha256()
    for path in sorted([folder / SETTINGS, *parts]):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
