"""One run of the study in a folder, which an interrupted run resumes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cat_fast.complexity import RatioThresholds, default_thresholds
from cat_fast.data.folder_lock import locked
from cat_fast.data.folder_settings import claim_folder
from cat_fast.data.images.io import decode_image
from cat_fast.data.streams.formats.base import ShardSet
from cat_fast.errors import UserError
from cat_fast.evaluation.complexity_study.measure import Models, image_readers, measure_all, measure_image
from cat_fast.evaluation.complexity_study.report import write_report
from cat_fast.evaluation.complexity_study.scores import ScoreSet
from cat_fast.evaluation.complexity_study.study import collect, summarize
from cat_fast.models.load import load_tokenizer
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.perceptual import perceptual_distance

MEASUREMENTS = "measurements.jsonl"


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings that the measurements depend on; a folder is resumed with the same ones."""

    images: str
    checkpoints: list[str]
    """Tokenizers whose ratios together decide f*."""
    signal: str | None = None
    """Tokenizer whose errors are metrics; None for the first checkpoint at its smallest ratio."""
    size: int = 512
    """Side in pixels of the images that are reconstructed."""
    distance: str = "auto"


def run_study(
    out: Path,
    settings: StudySettings,
    images: ShardSet,
    score_sets: Sequence[ScoreSet],
    *,
    thresholds: RatioThresholds | None = None,
    limit: int | None = None,
    gallery: int = 6,
    device: str = "auto",
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure the images, write the report into `out`, and return its results.

    Args:
        images: the set that `settings` names.
        thresholds: of the scores; the published ones by default.
        limit: number of images; None for all.
        gallery: images per pair of metrics that disagree; 0 for a report without images.
        on_done: called after each image.

    Raises:
        UserError: `out` contains a study with other settings, a checkpoint cannot be used, or too few images
            have scores.
    """
    with locked(out, "studying complexity"):
        models, name, target, weights = _load(settings, device)
        identity = asdict(settings) | {"distance": name, "weights": weights}
        claim_folder(out / "settings.json", identity, "a study of complexity")
        measure = partial(measure_image, models=models, size=settings.size, device=target)
        found = measure_all(images, out / MEASUREMENTS, measure, limit, on_done)
        sample = collect(found, score_sets, thresholds or default_thresholds())
        results = summarize(sample) | {
            "settings": asdict(settings) | {"distance": name},
            "scorers": {scores.name: scores.scorer for scores in score_sets},
            "unreadable": {row["key"]: row["error"] for row in found if row["error"] is not None},
        }
        write_report(out, results, sample, ImageLoader(images) if gallery else None, gallery)
    return results


def _load(settings: StudySettings, device: str) -> tuple[Models, str, torch.device, list[str]]:
    """Return the models, the name of the distance, the device, and the fingerprint of each tokenizer."""
    at: dict[int, Any] = {}
    weights: list[str] = []
    target = torch.device("cpu")
    for source in settings.checkpoints:
        tokenizer = load_tokenizer(Path(source), device)
        target = next(tokenizer.parameters()).device
        weights.append(tokenizer.fingerprint())
        for ratio in tokenizer.ratios:
            if ratio in at:
                raise UserError(f"--checkpoint {source}: the ratio {ratio}x is that of an earlier one, too")
            if settings.size % ratio:
                raise UserError(f"--size {settings.size}: not divisible by the ratio {ratio} of {source}")
            at[ratio] = partial(_reconstruct, tokenizer, ratio)
    if len(at) < 2:
        raise UserError(
            f"expected checkpoints with at least two ratios, got {', '.join(f'{f}x' for f in at)}; pass"
            " further ones with --checkpoint"
        )
    at = dict(sorted(at.items()))
    signal = next(iter(at.values()))
    if settings.signal is not None:
        tokenizer = load_tokenizer(Path(settings.signal), device)
        weights.append(tokenizer.fingerprint())
        signal = partial(_reconstruct, tokenizer, min(tokenizer.ratios))
    name, distance = perceptual_distance(settings.distance)
    return Models(at, signal, distance.to(target)), name, target, weights


def _reconstruct(tokenizer: NestedAutoencoderKL, ratio: int, images: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = tokenizer(images, ratio).sample
    return found


class ImageLoader:
    """Loads images by key, for the few in the gallery."""

    def __init__(self, images: ShardSet) -> None:
        self._readers = {key: read for key, _, read in image_readers(images) if not isinstance(read, str)}

    def __call__(self, key: str) -> Image.Image:
        return decode_image(self._readers[key]())
