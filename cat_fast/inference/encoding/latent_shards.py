"""Images of any number to shards of latents, by as many processes and machines as there are.

The input is cut into shards (`ShardSet`: an archive, or a run of files), and each of these, `per_shard`
samples at a time, into shards of latents: the k-th piece of input shard i becomes shard-iiiiii-kkkk. What a
shard holds is a function of the input alone, not of who writes it or when. So processes need no word of each
other; a shard that was lost to a crash is written again, and none is written twice. Its record
(`cat_fast.data.latents.format`) vouches for it, says what was left out and why, and whether it is the last of
its input shard, so that what is done is not even opened again.
"""

from collections import deque
from collections.abc import Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cat_fast.complexity.ratio_policy import Label, RatioChoice, RatioPolicy
from cat_fast.data.images.io import decode_image, image_to_bytes, resize_center_crop
from cat_fast.data.latents.format import SUFFIXES, LatentEntry, damage, read_json, write_shard
from cat_fast.data.latents.inputs import mark_readable, mark_unreadable, piece_name
from cat_fast.data.streams.formats.base import Entry, UnreadableShard
from cat_fast.data.text_files import escape_text
from cat_fast.errors import UserError
from cat_fast.inference.encoding.latent_file import unique_keys
from cat_fast.inference.encoding.ratio_batches import ToEncode, encode_by_ratio
from cat_fast.inference.encoding.shard_plan import NO_CLASSES, CacheSettings, Tally, Tell, Unit, open_images
from cat_fast.tokenizer import NestedAutoencoderKL

_DECODERS = 4


class LatentCache:
    """One process's hand in it."""

    def __init__(
        self, settings: CacheSettings, tokenizer: NestedAutoencoderKL, class_names: Sequence[str]
    ) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.fingerprint = tokenizer.fingerprint()
        self.images = open_images(settings.source, settings.image)
        self.classes = {name: number for number, name in enumerate(class_names)}
        self.numbered = not any(name.isdecimal() for name in class_names)
        """Whether a number as a class counts the names; where names are numbers, it is a name."""
        self.policy = self._policy()

    def run(self, unit: Unit, tell: Tell = lambda kind, images: None) -> Tally:
        """Write what is missing of a unit."""
        tally = Tally()
        if (done := self._finished(unit.input)) is not None:
            for record in done[unit.part :: unit.parts]:
                tell("found", _images(record))
                tell("done", _images(record))
                tally.add(record, new=False)
            return tally
        try:
            shard = self.images.open(unit.input)
        except UnreadableShard as error:
            why = f"{self.images.names[unit.input]}: {error}"
            mark_unreadable(self.settings.out, unit.input, why)
            tally.unreadable.append(why)
            return tally
        mark_readable(self.settings.out, unit.input)
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
                    tell("done", _images(there))
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
        return self.settings.out / f"{piece_name(index, number)}{SUFFIXES[self.settings.format]}"

    def _write(
        self, path: Path, piece: list[Entry], last: bool, decoders: ThreadPoolExecutor, tell: Tell
    ) -> dict[str, Any]:
        keys = unique_keys([escape_text(entry.key) for entry in piece])
        entries: dict[int, LatentEntry] = {}
        latents: dict[str, torch.Tensor] = {}
        skipped: dict[int, str] = {}

        def usable() -> Iterator[ToEncode[tuple[int, _Prepared]]]:
            for number, prepared in enumerate(self._prepared(piece, decoders)):
                if isinstance(prepared, str):
                    skipped[number] = prepared
                    tell("done", 1)
                else:
                    yield ToEncode((number, prepared), prepared.pixels, prepared.ratio)

        for batch in encode_by_ratio(self.tokenizer, usable(), self.settings.batch_size):
            for (number, prepared), latent in batch:
                if not torch.isfinite(latent).all():
                    skipped[number] = "its latent is not finite"
                    continue
                channels, height, width = latent.shape
                entries[number] = LatentEntry(
                    key=keys[number],
                    label=prepared.label,
                    ratio=prepared.ratio,
                    shape=(channels, height, width),
                    caption=piece[number].labels.caption or None,
                )
                latents[keys[number]] = latent
            tell("done", len(batch))
        return write_shard(
            path,
            latents,
            [entries[number] for number in sorted(entries)],
            self.fingerprint,
            last=last,
            skipped=[{"key": piece[number].key, "why": skipped[number]} for number in sorted(skipped)],
        )

    def _prepared(self, piece: list[Entry], decoders: ThreadPoolExecutor) -> "Iterator[_Prepared | str]":
        """In order, decoded a few batches ahead; for an entry that cannot be used, why."""
        ahead: deque[Future[_Prepared | str]] = deque()
        choices = self.policy.choose([entry.labels for entry in piece])
        for entry, choice in zip(piece, choices, strict=True):
            ahead.append(decoders.submit(self._prepare, entry, choice))
            if len(ahead) > 2 * self.settings.batch_size + _DECODERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _prepare(self, entry: Entry, choice: RatioChoice | UserError | None) -> "_Prepared | str":
        if entry.damage:
            return entry.damage
        try:
            label = self._label(entry.labels.category)
            image = decode_image(entry.read())
            if isinstance(choice, UserError):
                raise choice
            ratio = (choice or self.policy.choose_by_jpeg(image)).ratio
            if ratio not in self.tokenizer.config["ratios"]:
                raise UserError(f"the tokenizer has no ratio {ratio}")
            return _Prepared(image_to_bytes(resize_center_crop(image, self.settings.size)), ratio, label)
        except (OSError, UserError) as error:
            return str(error)

    def _label(self, category: str) -> int:
        if category in self.classes:
            return self.classes[category]
        if not category and list(self.classes) == NO_CLASSES:
            return 0
        if self.numbered and category.isdecimal() and int(category) < len(self.classes):
            return int(category)
        raise UserError(
            f"class {category!r} is none of the {len(self.classes)} classes"
            if category
            else "it has no class"
        )

    def _policy(self) -> RatioPolicy:
        """By ratio, else score, else caption; with thresholds of the run's own, ratios come last."""
        settings = self.settings
        order: tuple[Label, ...] = ("ratio", "score", "caption")
        if settings.thresholds is not None:
            order = ("score", "caption", "ratio")
        return RatioPolicy(order, settings.thresholds, fixed=settings.ratio)


class _Prepared(NamedTuple):
    pixels: torch.Tensor
    """(3, size, size) uint8."""
    ratio: int
    label: int


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
    """The record of a shard that is there, as far as its size tells: hashing all would take hours."""
    record_path = path.with_suffix(".json")
    if not record_path.is_file():
        return None
    record = read_json(record_path)
    return record if damage(path.parent, record) is None else None


def _images(record: dict[str, Any]) -> int:
    return len(record["latents"]) + len(record["skipped"])
