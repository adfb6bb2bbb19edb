"""Refusal of comparisons that gave users wrong figures, and deviations from the published protocol."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cat_fast.errors import UserError
from cat_fast.evaluation.generation.reference import Reference
from cat_fast.evaluation.generation.settings import FRECHET_OUTPUTS, GenerationSettings
from cat_fast.evaluation.images.sets import ImageSet

RECONSTRUCTION_MARK = "reconstruction.json"
"""File that `cat-fast eval reconstruction` writes next to its images."""
PUBLISHED_SAMPLES = 50_000


def check_samples(samples: ImageSet) -> None:
    """Refuse reconstructions as samples: their rFID needs their own originals as reference, not ADM's file.

    Raises:
        UserError: the folder was written by an evaluation of reconstructions.
    """
    for folder in (samples.path, *samples.path.absolute().parents[:2]):
        if (folder / RECONSTRUCTION_MARK).is_file():
            raise UserError(
                f"{samples.path}: these are reconstructions: rFID compares them with their originals, which a"
                " reference for generated images does not contain; use cat-fast eval reconstruction"
            )


def check_sizes(samples: ImageSet, reference: Reference) -> None:
    """Refuse a reference of another size or, where it is known, of another crop.

    Raises:
        UserError: they differ.
    """
    if reference.size is not None and reference.size != samples.size:
        ours, theirs = (f"{size[1]} x {size[0]}" for size in (samples.size, reference.size))
        raise UserError(
            f"{reference.path}: its images have {theirs} px, the samples {ours} px; FID depends on the size:"
            " use the reference of this resolution, or --crop for a folder of images"
        )
    if reference.own_record is None:
        return
    ours, theirs = samples.record()["crop"], reference.own_record["images"]["crop"]
    if not {ours, theirs} & {"none", "unknown"} and ours != theirs:
        raise UserError(
            f"{reference.path}: its images were cropped otherwise ({theirs}) than the samples ({ours}); make"
            " it again with the same --crop-mode"
        )


def check_statistics_source(reference: Reference, settings: GenerationSettings) -> None:
    """Refuse FID against the few images of a reference file that lacks statistics of the complete set.

    Raises:
        UserError: the file has `arr_0` but not the statistics that the metrics need.
    """
    if reference.path.is_dir() or settings.images_as_statistics:
        return
    for metric, output in FRECHET_OUTPUTS.items():
        if metric not in settings.chosen or output in reference.statistics or settings.proxy:
            continue
        if output == "spatial" and reference.statistics:
            raise UserError(
                f"{reference.path}: mu_s and sigma_s are missing, which sFID needs; use ADM's file with all"
                " statistics, or leave sFID out: --metrics "
                + ",".join(m for m in settings.chosen if m != "sfid")
            )
        count = reference.images.count if reference.images else 0
        raise UserError(
            f"{reference.path}: mu and sigma are missing. Its {count} images are a part of the reference, for"
            " precision and recall: FID against them cannot be compared with published figures; use a file"
            " with statistics, or accept it with --images-as-statistics"
        )


def check_count(name: str, count: int, features: int, settings: GenerationSettings) -> None:
    """Refuse covariances of fewer images than features, which make the Fréchet distance meaningless.

    Raises:
        UserError: too few images, unless the settings allow them.
    """
    if count <= features and not settings.allow_few:
        raise UserError(
            f"{name}: {count} images for {features} features: the covariance is singular, and the distance"
            " depends on the number of images more than on their quality; draw more, report KID (--metrics"
            " kid), or pass --allow-few-samples"
        )


def check_scale_recorded(pipeline: Path, config: dict[str, Any]) -> None:
    """Refuse a transformer whose configuration lacks the statistics that its latents were scaled with.

    Raises:
        UserError: `shift_factor` or `scaling_factor` is missing.
    """
    missing = [name for name in ("shift_factor", "scaling_factor") if config.get(name) is None]
    if missing:
        raise UserError(
            f"{pipeline}: transformer/config.json lacks {' and '.join(missing)}, the statistics of its"
            " latents: images decoded without them are wrong; assemble it again with cat-fast pipeline"
        )


def deviations(
    samples: int,
    formats: Iterable[str],
    reference: dict[str, Any],
    settings: GenerationSettings,
    references: int | None,
) -> list[str]:
    """Return how an evaluation differs from the protocol of the published FID-50K tables.

    Args:
        samples: number of usable samples.
        formats: file name extensions of the samples.
        reference: record of the reference.
        references: number of references for precision and recall.
    """
    found = []
    if settings.proxy:
        found.append("features of an offline trunk")
    if samples != PUBLISHED_SAMPLES:
        found.append(f"{samples} samples instead of {PUBLISHED_SAMPLES}")
    if "pr" in settings.chosen:
        if settings.pr_network != "inception":
            found.append(f"precision and recall on {settings.pr_network} features instead of inception")
        if settings.k != 3:
            found.append(f"precision and recall with k = {settings.k} instead of 3")
        if references is not None and references != 10_000:
            found.append(f"{references} references for precision and recall instead of 10000")
    if settings.images_as_statistics:
        found.append("reference statistics of a part of the reference")
    if "statistics" in reference and reference["statistics"]["dtype"] != "float64":
        found.append(f"reference statistics stored in {reference['statistics']['dtype']}")
    lossy = {"jpg", "jpeg", "webp"} & set(formats)
    if lossy:
        found.append(f"samples saved with lossy compression ({', '.join(sorted(lossy))})")
    return found
