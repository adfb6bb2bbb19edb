"""Settings and work units for encoding images into latent shards."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from cat_fast.complexity import JpegThresholds, RatioThresholds
from cat_fast.complexity.image_scorers.loading import by_pixels
from cat_fast.complexity.ratios.image_ratios import PHOTOGRAPHS, load_index
from cat_fast.complexity.ratios.policy import Label, OriginTally, RatioPolicy
from cat_fast.complexity.scorers.loading import bulk_scorer
from cat_fast.data.latents.format import (
    HEADER,
    SCALE,
    SUFFIXES,
    claim_latents,
    read_json,
    require_settings,
)
from cat_fast.data.latents.inputs import INPUT_SHARDS
from cat_fast.data.ratio_origin import RatioOrigin, origins_from_json
from cat_fast.data.streams.formats.base import ARCHIVE_SUFFIXES, ShardSet, UnreadableShard
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.image_files import FolderShards, IndexShards, RecordShards
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.tar import TarShards, is_archive, list_shards
from cat_fast.errors import UserError
from cat_fast.inference.encoding.input_check import InputCheck
from cat_fast.inference.encoding.pieces import finished_records
from cat_fast.inference.encoding.requirements import require_patches
from cat_fast.inference.encoding.tokenizer_identity import TokenizerIdentity
from cat_fast.integers import store_integers

DEFAULT_CLASSES = ["image"]
"""Class names of an image set without classes."""

OnProgress = Callable[[str, int], None]
"""Called with ("found", images) when an input shard is opened, and ("done", images) for images encoded or
skipped."""


DTYPE_NAMES = ("fp32", "bf16", "fp16")
"""Keys of `cat_fast.models.execution.DTYPES`, which imports torch."""


@dataclass(frozen=True, kw_only=True)
class EncodeShardsSettings:
    """Settings of an encoding run: images, output folder, ratios and shard format.

    Raises:
        UserError: the size does not divide into patches, the format is unknown, or a count is below 1.
    """

    source: str
    """Image set, as for `open_images`."""
    out: Path
    size: int = 256
    """Side, in pixels, to which the centre square of an image is scaled."""
    ratio: int | None = None
    """Ratio of all images; None for each image's own."""
    thresholds: RatioThresholds | None = None
    """Thresholds from scores to ratios, which take precedence over ratio labels. None: ratio labels take
    precedence, with the default thresholds for scores."""
    image: str = ""
    """Extension of the image in samples of archives that contain several."""
    jpeg_thresholds: JpegThresholds | None = None
    """Thresholds from JPEG sizes to ratios, for images without labels; None for `image_student`."""
    per_shard: int = 1024
    """Maximum number of latents per shard."""
    batch_size: int = 8
    """Images per forward pass."""
    format: str = "safetensors"
    """Shard format, "safetensors" or "webdataset"."""
    dtype: str = "fp32"
    """Dtype of the tokenizer, one of DTYPE_NAMES."""

    def __post_init__(self) -> None:
        store_integers(self, "ratio")
        require_patches(self.size, 32)
        if self.format not in SUFFIXES:
            raise UserError(f"format {self.format!r}: expected {' or '.join(SUFFIXES)}")
        if self.dtype not in DTYPE_NAMES:
            raise UserError(f"--dtype {self.dtype}: expected auto, {', '.join(DTYPE_NAMES)}")
        for name in ("per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")

    def policy(self) -> RatioPolicy:
        """Return the policy: ratio, then score, then caption; if thresholds are set, ratio comes last."""
        order: tuple[Label, ...] = ("ratio", "score", "caption")
        if self.thresholds is not None:
            order = ("score", "caption", "ratio")
        return RatioPolicy(
            order,
            self.thresholds,
            bulk_scorer(),
            fixed=self.ratio,
            **by_pixels(self.jpeg_thresholds),
        )


class WorkUnit(NamedTuple):
    """Work of one process: every `parts`-th piece of an input shard, starting at piece `part`."""

    input: int
    part: int = 0
    parts: int = 1


@dataclass
class EncodingSummary:
    """Counts over the latent shards of some work units."""

    shards: int = 0
    latents: int = 0
    encoded: int = 0
    """Number of latents encoded by this run; the others existed before."""
    tokens: int = 0
    """Total tokens at patch size 2."""
    ratios: Counter[int] = field(default_factory=Counter)
    """Number of latents per ratio."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """{"key", "why"} per sample that could not be used."""
    origins: Counter[RatioOrigin] = field(default_factory=Counter)
    """Number of latents per origin of their ratio."""
    unreadable: list[str] = field(default_factory=list)
    """Input shards that could not be opened, with the reason; the next run tries them again."""

    def add_shard(self, record: dict[str, Any], new: bool) -> None:
        """Add a latent shard, given its record."""
        self.shards += 1
        self.latents += len(record["latents"])
        self.encoded += new * len(record["latents"])
        self.tokens += sum(entry["shape"][1] * entry["shape"][2] // 4 for entry in record["latents"])
        self.ratios.update(entry["ratio"] for entry in record["latents"])
        self.skipped += record["skipped"]
        self.origins += origins_from_json(record.get("origins", ()))

    def merge(self, other: "EncodingSummary") -> None:
        """Add the counts of another summary."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def open_images(source: str, image: str = "") -> ShardSet:
    """Open an image set.

    Args:
        source: `photographs` (the packaged ones), an image index, a folder of images, or webdataset archives.
            Archives are given as a folder, or as a pattern of
            `cat_fast.data.streams.formats.tar.list_shards`.
        image: see `TarShards`.

    Raises:
        UserError: the source is missing or contains no images.
    """
    path = Path(source)
    if source == PHOTOGRAPHS and not image:
        return RecordShards(load_index(source))
    if path.is_dir():
        archives = any(map(is_archive, os.listdir(path)))
    else:
        archives = (
            "://" in source or source.lower().endswith(ARCHIVE_SUFFIXES) or any(c in source for c in "*{")
        )
    if archives:
        problems = ProblemLog()
        remote = Remote(StreamConfig(), problems)
        return TarShards(list_shards(source, remote), remote, problems, image)
    if image:
        raise UserError(f"--image {image}: applies to archives, but {source} is not one; leave it out")
    if path.is_dir():
        return FolderShards(path, described=True)
    return IndexShards(path)


def recorded_dtype(out: Path) -> str | None:
    """Return the dtype in which the latents of a folder are encoded; None if there are none yet."""
    if not (out / HEADER).is_file():
        return None
    return read_json(out / HEADER).get("dtype") or "fp32"


def prepare_folder(
    settings: EncodeShardsSettings,
    images: ShardSet,
    tokenizer: TokenizerIdentity,
    classes: Sequence[str] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 1,
) -> list[str]:
    """Create or check the output folder; return the class names.

    Without `classes`, the names are those of an existing output folder, or else all names in the images'
    labels, sorted. Collecting the latter takes one pass over the labels. Of an existing folder, the samples
    encoded from this machine's input shards are compared (`InputCheck`).

    Args:
        images: the image set that `settings` names.
        rank, world_size, workers: as for `work_units`.

    Raises:
        UserError: class names are needed from a shard that cannot be opened; or the folder contains latents
            of another tokenizer, of other images, or made with other settings.
    """
    if classes is None and (settings.out / HEADER).is_file():
        classes = read_json(settings.out / HEADER).get("class_names")
    classes = list(classes or _classes_of(images))
    check = InputCheck(images, settings.out, settings.per_shard, settings.format)
    header = {
        "fingerprint": tokenizer.fingerprint,
        SCALE: tokenizer.scale,
        "resolution": settings.size,
        "class_names": classes,
        "latents_per_shard": settings.per_shard,
        "format": settings.format,
        "image": settings.image or None,
        "dtype": None if settings.dtype == "fp32" else settings.dtype,
    } | _ratio_rule(settings)
    require_settings(settings.out, header)
    check.check({unit.input for unit in work_units(rank, world_size, workers, len(images.names))})
    claim_latents(settings.out, header | {INPUT_SHARDS: len(images.names)})
    check.claim()
    return classes


def count_labels(settings: EncodeShardsSettings, images: ShardSet) -> OriginTally:
    """Return ratios and origins of the images to encode, by the labels of a part of them.

    It is empty if labels are known only once images are read; `EncodingSummary.origins` then counts them.
    """
    tally = OriginTally(settings.policy())
    tally.count(images)
    return tally


def summarize_finished(
    settings: EncodeShardsSettings, units: Sequence[WorkUnit]
) -> tuple[EncodingSummary, list[WorkUnit]]:
    """Return the counts of the work units whose input shards are complete, and the other units."""
    summary = EncodingSummary()
    unfinished: list[WorkUnit] = []
    for index, of_input in groupby(units, key=attrgetter("input")):
        records = finished_records(settings.out, index, settings.format)
        if records is None:
            unfinished += of_input
            continue
        for unit in of_input:
            for record in records[unit.part :: unit.parts]:
                summary.add_shard(record, new=False)
    return summary, unfinished


def _ratio_rule(settings: EncodeShardsSettings) -> dict[str, Any]:
    """Return what decides ratios: labels in their order, scorer, thresholds; None for what is not used."""
    if settings.ratio is not None:
        unused = ("labels", "scored_by", "thresholds", "jpeg_thresholds", "pixels")
        return {"ratio": settings.ratio, **dict.fromkeys(unused)}
    policy = settings.policy()
    return {
        "ratio": "auto",
        "labels": list(policy.labels),
        "scored_by": asdict(policy.scored_by),
        "thresholds": list(policy.thresholds.pair),
        "jpeg_thresholds": [policy.jpeg.a, policy.jpeg.b] if policy.pixels is None else None,
        "pixels": f"{policy.pixels.name} {policy.pixels.version}" if policy.pixels is not None else None,
    }


def work_units(rank: int, world_size: int, workers: int, input_shards: int) -> list[WorkUnit]:
    """Return the work units of machine `rank` of `world_size`, each with `workers` processes.

    Together, the machines cover every piece exactly once.
    """
    parts = -(-world_size * workers // input_shards)  # with few input shards, processes share them
    units = [WorkUnit(index, part, parts) for index in range(input_shards) for part in range(parts)]
    return units[rank::world_size]


def _classes_of(images: ShardSet) -> list[str]:
    found: set[str] = set()
    for index, shard in enumerate(images.names):
        try:
            found |= _categories(images, index)
        except UnreadableShard as error:
            raise UserError(
                f"{shard} cannot be opened ({error}), but its labels are needed to find all class names; "
                "repair it, or list the names with --classes"
                f" (only {DEFAULT_CLASSES[0]!r} if images have no classes)"
            ) from error
    names = sorted(found - {""}, key=lambda name: (int(name) if name.isdecimal() else -1, name))
    return names or DEFAULT_CLASSES


def _categories(images: ShardSet, index: int) -> set[str]:
    if isinstance(images, TarShards):
        return images.categories(index)
    labels = images.labels(index)
    if labels is None:
        labels = [entry.labels for entry in images.open(index).entries(0)]
    return {label.category for label in labels}
