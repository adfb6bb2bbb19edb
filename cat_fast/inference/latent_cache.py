"""Pictures of any number to shards of latents, by as many processes and machines as there are.

The input is cut into shards (`ShardSet`: an archive, or a run of files), and each of these, `per_shard`
samples at a time, into shards of latents: the k-th piece of input shard i becomes shard-iiiiii-kkkk. What a
shard holds is a function of the input alone, not of who writes it or when. So processes need no word of each
other; a shard that was lost to a crash is written again, and none is written twice. Its record
(`cat_fast.data.latent_format`) vouches for it, says what was left out and why, and whether it is the last of
its input shard, so that what is done is not even opened again.
"""

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cat_fast.complexity import Description, RatioThresholds, choose_ratio, default_thresholds, jpeg_ratio
from cat_fast.complexity.indexing import PHOTOGRAPHS, load_index
from cat_fast.complexity.jpeg_size import JPEG_SIDE
from cat_fast.data.images import decode_image, image_to_bytes, resize_center_crop
from cat_fast.data.latent_format import (
    HEADER,
    SUFFIXES,
    LatentEntry,
    damage,
    read_json,
    write_or_check_header,
    write_shard,
)
from cat_fast.data.streams.config import StreamConfig
from cat_fast.data.streams.listed import FolderShards, IndexShards, RecordShards
from cat_fast.data.streams.problems import Problems
from cat_fast.data.streams.remote import Remote
from cat_fast.data.streams.shard import Entry, Labels, ShardSet, UnreadableShard
from cat_fast.data.streams.tar_shards import TarShards, list_shards
from cat_fast.errors import UserError
from cat_fast.inference.codec import encode_batch, require_patches
from cat_fast.inference.photo_ratio import require_served
from cat_fast.tokenizer import NestedAutoencoderKL

NO_CLASSES = ["picture"]
"""The one class of pictures that have none."""
_DECODERS = 4

Tell = Callable[[str, int], None]
"""Told ("found", pictures) when an input shard is opened, and ("done", pictures) as they are encoded or left
out."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What latents are made of what pictures.

    Raises:
        UserError: a size that makes no whole number of patches, an unknown format, counts below 1.
    """

    source: str
    """As for `open_pictures`."""
    out: Path
    size: int = 256
    """Side in pixels that the centre square of a picture is scaled to."""
    ratio: int | None = None
    """One for all, or None: each picture's own."""
    thresholds: RatioThresholds | None = None
    """From scores to ratios, over the ratio that a picture's labels say; None takes that, or the default
    pair."""
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


def open_pictures(source: str) -> ShardSet:
    """`photographs` (those that ship), an image index, a folder of pictures, or webdataset archives: a folder
    of them, or a pattern of `cat_fast.data.streams.tar_shards.list_shards`.

    Raises:
        UserError: nothing is there.
    """
    if source == PHOTOGRAPHS:
        return RecordShards(load_index(source))
    path = Path(source)
    if path.is_dir() and not any(path.glob("*.tar")):
        return FolderShards(path, described=True)
    if path.is_dir() or "://" in source or source.endswith((".tar", ".tar.gz")) or set(source) & set("*{"):
        problems = Problems()
        remote = Remote(StreamConfig(), problems)
        return TarShards(list_shards(source, remote), remote, problems)
    return IndexShards(path)


def prepare(
    settings: CacheSettings, tokenizer: NestedAutoencoderKL, classes: Sequence[str] | None = None
) -> tuple[int, list[str]]:
    """Claim the folder; returns the number of input shards, and the classes.

    Without `classes` they are those of a folder that was begun before, or all that the pictures' labels name,
    in order, which takes one pass over the labels.

    Raises:
        UserError: no such pictures; ratios that the tokenizer lacks; the folder holds latents of another
            tokenizer, of other pictures, or made otherwise.
    """
    require_served(settings.ratio, tokenizer.config["ratios"])
    pictures = open_pictures(settings.source)
    if classes is None and (settings.out / HEADER).is_file():
        classes = read_json(settings.out / HEADER).get("class_names")
    classes = list(classes or _classes_of(pictures))
    # A set that has moved is the same set, one that has grown is not.
    names = (
        "\n".join(name.rpartition("/")[2] for name in pictures.names) + f"\n{getattr(pictures, 'extent', '')}"
    )
    thresholds = settings.thresholds
    write_or_check_header(
        settings.out,
        {
            "fingerprint": tokenizer.fingerprint(),
            "resolution": settings.size,
            "class_names": classes,
            "input_shards": len(pictures.names),
            "input_digest": hashlib.sha256(names.encode()).hexdigest()[:16],
            "latents_per_shard": settings.per_shard,
            "format": settings.format,
            "ratio": settings.ratio or "auto",
            "thresholds": None if thresholds is None else [thresholds.a, thresholds.b],
        },
    )
    return len(pictures.names), classes


def units_of(rank: int, world_size: int, workers: int, input_shards: int) -> list[Unit]:
    """The units of one of `world_size` machines with `workers` processes each; together they are all, each
    once."""
    parts = -(-world_size * workers // input_shards)  # few shards are shared, piece by piece
    units = [Unit(index, part, parts) for index in range(input_shards) for part in range(parts)]
    return units[rank::world_size]


class LatentCache:
    """One process's hand in it."""

    def __init__(
        self, settings: CacheSettings, tokenizer: NestedAutoencoderKL, class_names: Sequence[str]
    ) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.fingerprint = tokenizer.fingerprint()
        self.pictures = open_pictures(settings.source)
        self.classes = {name: number for number, name in enumerate(class_names)}
        self.thresholds = settings.thresholds or default_thresholds()

    def run(self, unit: Unit, tell: Tell = lambda kind, pictures: None) -> Tally:
        """Write what is missing of a unit."""
        tally = Tally()
        if (done := self._finished(unit.input)) is not None:
            for record in done[unit.part :: unit.parts]:
                tell("found", _pictures(record))
                tell("done", _pictures(record))
                tally.add(record, new=False)
            return tally
        try:
            shard = self.pictures.open(unit.input)
        except UnreadableShard as error:
            tally.unreadable.append(f"{self.pictures.names[unit.input]}: {error}")
            return tally
        known = isinstance(shard, Sized)
        if isinstance(shard, Sized):
            tell("found", -(-len(shard) // unit.parts))
        with ThreadPoolExecutor(_DECODERS) as decoders:
            for number, piece, last in _pieces(shard.entries(0), self.settings.per_shard):
                if number % unit.parts != unit.part:
                    continue
                if not known:
                    tell("found", len(piece))
                path = self._path(unit.input, number)
                there = _whole(path)
                if there is not None:
                    tell("done", _pictures(there))
                tally.add(there or self._write(path, piece, last, decoders, tell), new=there is None)
        return tally

    def _finished(self, index: int) -> list[dict[str, Any]] | None:
        """The records of all pieces of an input shard, where they are there to the last."""
        found = []
        for number in count():
            record = _whole(self._path(index, number))
            if record is None:
                return None
            found.append(record)
            if record["last"]:
                break
        return found

    def _path(self, index: int, number: int) -> Path:
        return self.settings.out / f"shard-{index:06d}-{number:04d}{SUFFIXES[self.settings.format]}"

    def _write(
        self, path: Path, piece: list[Entry], last: bool, decoders: ThreadPoolExecutor, tell: Tell
    ) -> dict[str, Any]:
        keys = _unique([entry.key for entry in piece])
        entries: dict[int, LatentEntry] = {}
        latents: dict[str, torch.Tensor] = {}
        skipped: dict[int, str] = {}
        waiting: dict[int, list[tuple[int, _Prepared]]] = defaultdict(list)

        def flush(ratio: int) -> None:
            numbers, batch = zip(*waiting.pop(ratio), strict=True)
            pictures = [prepared.pixels.float().div_(127.5).sub_(1) for prepared in batch]
            for number, prepared, latent in zip(
                numbers, batch, encode_batch(self.tokenizer, pictures, ratio), strict=True
            ):
                if not torch.isfinite(latent).all():
                    skipped[number] = "its latent is not finite"
                    continue
                channels, height, width = latent.shape
                entries[number] = LatentEntry(
                    key=keys[number],
                    label=prepared.label,
                    ratio=ratio,
                    shape=(channels, height, width),
                    caption=piece[number].labels.caption or None,
                )
                latents[keys[number]] = latent
            tell("done", len(batch))

        for number, prepared in enumerate(self._prepared(piece, decoders)):
            if isinstance(prepared, str):
                skipped[number] = prepared
                tell("done", 1)
                continue
            waiting[prepared.ratio].append((number, prepared))
            if len(waiting[prepared.ratio]) == self.settings.batch_size:
                flush(prepared.ratio)
        for ratio in list(waiting):
            flush(ratio)
        return write_shard(
            path,
            latents,
            [entries[number] for number in sorted(entries)],
            self.fingerprint,
            last=last,
            skipped=[{"key": keys[number], "why": skipped[number]} for number in sorted(skipped)],
        )

    def _prepared(self, piece: list[Entry], decoders: ThreadPoolExecutor) -> "Iterator[_Prepared | str]":
        """In order, decoded a few batches ahead; for an entry that cannot be used, why."""
        ahead: deque[Future[_Prepared | str]] = deque()
        for entry in piece:
            ahead.append(decoders.submit(self._prepare, entry))
            if len(ahead) > 2 * self.settings.batch_size + _DECODERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _prepare(self, entry: Entry) -> "_Prepared | str":
        if entry.damage:
            return entry.damage
        try:
            label = self._label(entry.labels.category)
            image = decode_image(entry.read())
            ratio = self._ratio(entry.labels, lambda: resize_center_crop(image, JPEG_SIDE))
            return _Prepared(image_to_bytes(resize_center_crop(image, self.settings.size)), ratio, label)
        except (OSError, UserError) as error:
            return str(error)

    def _label(self, category: str) -> int:
        if category in self.classes:
            return self.classes[category]
        if not category and list(self.classes) == NO_CLASSES:
            return 0
        if category.isdecimal() and int(category) < len(self.classes):
            return int(category)
        raise UserError(
            f"class {category!r} is none of the {len(self.classes)} classes"
            if category
            else "it has no class"
        )

    def _ratio(self, labels: Labels, square: Callable[[], Any]) -> int:
        """One for all, else by the labels' ratio or score, else by the caption, else by the JPEG size."""
        fixed, own = self.settings.ratio, labels.ratio
        if fixed is not None:
            return fixed
        if own is None or self.settings.thresholds is not None:
            if labels.score is not None:
                own = self.thresholds.ratio(labels.score)
            elif labels.caption:
                said = Description(labels.caption, labels.has_text, labels.has_faces)
                own = choose_ratio(said, thresholds=self.thresholds).ratio
        own = jpeg_ratio(image_to_bytes(square())) if own is None else own
        if own not in self.tokenizer.config["ratios"]:
            raise UserError(f"the tokenizer has no ratio {own}")
        return own


class _Prepared(NamedTuple):
    pixels: torch.Tensor
    """(3, size, size) uint8."""
    ratio: int
    label: int


def _classes_of(pictures: ShardSet) -> list[str]:
    found: set[str] = set()
    for index in range(len(pictures.names)):
        try:
            labels = pictures.labels(index)
            if labels is None:
                labels = [entry.labels for entry in pictures.open(index).entries(0)]
        except UnreadableShard:
            continue
        found.update(label.category for label in labels)
    names = sorted(found - {""}, key=lambda name: (int(name) if name.isdecimal() else -1, name))
    return names or NO_CLASSES


def _pieces(entries: Iterator[Entry], size: int) -> Iterator[tuple[int, list[Entry], bool]]:
    """(number, entries, whether it is the last), `size` entries at a time."""
    head = next(entries, None)
    for number in count():
        if head is None:
            return
        piece = [head, *islice(entries, size - 1)]
        head = next(entries, None)
        yield number, piece, head is None


def _whole(path: Path) -> dict[str, Any] | None:
    """The record of a shard that is there."""
    record_path = path.with_suffix(".json")
    if not record_path.is_file():
        return None
    record = read_json(record_path)
    return record if damage(path.parent, record) is None else None


def _pictures(record: dict[str, Any]) -> int:
    return len(record["latents"]) + len(record["skipped"])


def _unique(keys: Sequence[str]) -> list[str]:
    """The second "cat" becomes "cat-2"."""
    taken = {"__metadata__"}  # safetensors keeps this name for itself
    unique = []
    for key in keys:
        name, number = key, 1
        while name in taken:
            number += 1
            name = f"{key}-{number}"
        taken.add(name)
        unique.append(name)
    return unique
