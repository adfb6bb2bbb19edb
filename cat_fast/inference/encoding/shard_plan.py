"""Which latents are made of which images, and who makes them: the door of the latent cache."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cat_fast.complexity import RatioThresholds
from cat_fast.complexity.image_ratios import PHOTOGRAPHS, load_index
from cat_fast.data.latents.format import HEADER, SUFFIXES, claim_latents, read_json
from cat_fast.data.latents.inputs import INPUT_SHARDS
from cat_fast.data.streams.formats.base import ShardSet, UnreadableShard
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.image_files import FolderShards, IndexShards, RecordShards
from cat_fast.data.streams.formats.problems import Problems
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.sidecar import ARCHIVE_SUFFIXES
from cat_fast.data.streams.formats.tar import TarShards, is_archive, list_shards
from cat_fast.errors import UserError
from cat_fast.inference.encoding.codec import require_patches, require_served
from cat_fast.tokenizer import NestedAutoencoderKL

NO_CLASSES = ["image"]
"""The one class of images that have none."""

Tell = Callable[[str, int], None]
"""Told ("found", images) when an input shard is opened, and ("done", images) as they are encoded or left
out."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What latents are made of what images.

    Raises:
        UserError: a size that makes no whole number of patches, an unknown format, counts below 1.
    """

    source: str
    """As for `open_images`."""
    out: Path
    size: int = 256
    """Side in pixels that the centre square of an image is scaled to."""
    ratio: int | None = None
    """One for all, or None: each image's own."""
    thresholds: RatioThresholds | None = None
    """From scores to ratios, over the ratio that an image's labels say; None takes that, or the default
    pair."""
    image: str = ""
    """Extension of the image in samples of archives that contain several."""
    per_shard: int = 1024
    batch_size: int = 8
    format: str = "safetensors"

    def __post_init__(self) -> None:
        require_patches(self.size, 32)
        if self.format not in SUFFIXES:
            raise UserError(f"format {self.format!r}: expected {' or '.join(SUFFIXES)}")
        for name in ("per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: at least 1 is needed")


class Unit(NamedTuple):
    """Work that one process does: every `parts`-th piece of an input shard, from number `part` on."""

    input: int
    part: int = 0
    parts: int = 1


@dataclass
class Tally:
    """What is there of the latents of some units."""

    shards: int = 0
    latents: int = 0
    encoded: int = 0
    """Of the latents, those that were not there before."""
    tokens: int = 0
    """For a patch size of 2."""
    ratios: Counter[int] = field(default_factory=Counter)
    skipped: list[dict[str, str]] = field(default_factory=list)
    """{"key", "why"} of every sample that could not be used."""
    unreadable: list[str] = field(default_factory=list)
    """Input shards that could not be opened, and why; the next run tries them again."""

    def add(self, record: dict[str, Any], new: bool) -> None:
        """A shard, by its record."""
        self.shards += 1
        self.latents += len(record["latents"])
        self.encoded += new * len(record["latents"])
        self.tokens += sum(entry["shape"][1] * entry["shape"][2] // 4 for entry in record["latents"])
        self.ratios.update(entry["ratio"] for entry in record["latents"])
        self.skipped += record["skipped"]

    def join(self, other: "Tally") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def open_images(source: str, image: str = "") -> ShardSet:
    """`photographs` (those that ship), an image index, a folder of images, or webdataset archives: a folder
    of them, or a pattern of `cat_fast.data.streams.formats.tar.list_shards`.

    Args:
        image: see `TarShards`.

    Raises:
        UserError: nothing is there.
    """
    path = Path(source)
    if source == PHOTOGRAPHS and not image:
        return RecordShards(load_index(source))
    if path.is_dir():
        archives = any(map(is_archive, os.listdir(path)))
    else:
        archives = "://" in source or source.endswith(ARCHIVE_SUFFIXES) or any(c in source for c in "*{")
    if archives:
        problems = Problems()
        remote = Remote(StreamConfig(), problems)
        return TarShards(list_shards(source, remote), remote, problems, image)
    if image:
        raise UserError(f"--image {image}: applies to archives, but {source} is not one; leave it out")
    if path.is_dir():
        return FolderShards(path, described=True)
    return IndexShards(path)


def prepare(
    settings: CacheSettings, tokenizer: NestedAutoencoderKL, classes: Sequence[str] | None = None
) -> tuple[int, list[str]]:
    """Claim the folder; returns the number of input shards, and the classes.

    Without `classes` they are those of a folder that was begun before, or all that the images' labels name,
    in order, which takes one pass over the labels.

    Raises:
        UserError: no such images; classes that have to be found in a shard that cannot be opened; ratios
            that the tokenizer lacks; the folder holds latents of another tokenizer, of other images, or
            made otherwise.
    """
    require_served(settings.ratio, tokenizer.config["ratios"])
    images = open_images(settings.source, settings.image)
    if classes is None and (settings.out / HEADER).is_file():
        classes = read_json(settings.out / HEADER).get("class_names")
    classes = list(classes or _classes_of(images))
    # A set that has moved is the same set, one that has grown is not.
    names = "\n".join(name.rpartition("/")[2] for name in images.names) + f"\n{getattr(images, 'extent', '')}"
    thresholds = settings.thresholds
    claim_latents(
        settings.out,
        {
            "fingerprint": tokenizer.fingerprint(),
            "resolution": settings.size,
            "class_names": classes,
            INPUT_SHARDS: len(images.names),
            "input_digest": hashlib.sha256(names.encode(errors="surrogatepass")).hexdigest()[:16],
            "latents_per_shard": settings.per_shard,
            "format": settings.format,
            "ratio": settings.ratio or "auto",
            "thresholds": None if thresholds is None else [thresholds.a, thresholds.b],
            "image": settings.image or None,
        },
    )
    return len(images.names), classes


def units_of(rank: int, world_size: int, workers: int, input_shards: int) -> list[Unit]:
    """The units of one of `world_size` machines with `workers` processes each; together they are all, each
    once."""
    parts = -(-world_size * workers // input_shards)  # few shards are shared, piece by piece
    units = [Unit(index, part, parts) for index in range(input_shards) for part in range(parts)]
    return units[rank::world_size]


def _classes_of(images: ShardSet) -> list[str]:
    found: set[str] = set()
    for index, shard in enumerate(images.names):
        try:
            found |= _categories(images, index)
        except UnreadableShard as error:
            raise UserError(
                f"{shard} cannot be opened ({error}), and the folder's classes are settled now: mend it, or "
                f"name all classes with --classes ({NO_CLASSES[0]!r} alone where images have none)"
            ) from error
    names = sorted(found - {""}, key=lambda name: (int(name) if name.isdecimal() else -1, name))
    return names or NO_CLASSES


def _categories(images: ShardSet, index: int) -> set[str]:
    if isinstance(images, TarShards):
        return images.categories(index)
    labels = images.labels(index)
    if labels is None:
        labels = [entry.labels for entry in images.open(index).entries(0)]
    return {label.category for label in labels}
