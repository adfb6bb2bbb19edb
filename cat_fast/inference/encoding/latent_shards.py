"""Encoding of large image sets into latent shards, on any number of processes and machines.

The input consists of shards (`ShardSet`: an archive, or a run of files). Each is split into pieces of
`per_shard` samples; piece k of input shard i becomes latent shard shard-iiiiii-kkkk. A latent shard's content
depends on the input alone, so processes need no communication: a shard lost in a crash is written again, and
none is written twice. Each shard has a record (`cat_fast.data.latents.format`) with its checksum and the
skipped samples with reasons. It also marks the last piece of an input shard, so that completed input shards
are not opened again.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cat_fast.complexity.ratios.policy import RatioChoice
from cat_fast.data.images.io import decode_image, image_to_bytes, resize_center_crop
from cat_fast.data.input_samples import NOT_READ, SampleRecord, file_stamp, hash_content, hash_labels
from cat_fast.data.latents.format import LatentEntry, require_settings
from cat_fast.data.latents.inputs import mark_readable, mark_unreadable
from cat_fast.data.latents.shard_file import write_shard
from cat_fast.data.ratio_origin import RatioOrigin, origins_to_json
from cat_fast.data.streams.formats.base import Entry, ShardSet, UnreadableShard
from cat_fast.data.streams.formats.tar import TarShards
from cat_fast.data.text_files import escape_text
from cat_fast.errors import UserError
from cat_fast.inference.encoding.codec import NOT_FINITE
from cat_fast.inference.encoding.latent_file import unique_keys
from cat_fast.inference.encoding.pieces import complete_record, piece_path, split_pieces
from cat_fast.inference.encoding.ratio_batches import ImageToEncode, encode_by_ratio
from cat_fast.inference.encoding.shard_plan import (
    DEFAULT_CLASSES,
    EncodeShardsSettings,
    EncodingSummary,
    OnProgress,
    WorkUnit,
)
from cat_fast.tokenizer import NestedAutoencoderKL

_DECODERS = min(16, max(4, len(os.sched_getaffinity(0))))
"""Threads that decode images: one per core, because decoding releases the interpreter's lock."""


class ShardEncoder:
    """Encoder of work units into latent shards, one per process.

    Args:
        images: the image set that `settings` names.

    Raises:
        UserError: the output folder contains latents of another tokenizer.
    """

    def __init__(
        self,
        settings: EncodeShardsSettings,
        images: ShardSet,
        tokenizer: NestedAutoencoderKL,
        class_names: Sequence[str],
    ) -> None:
        self.settings, self.images, self.tokenizer = settings, images, tokenizer
        self.fingerprint = tokenizer.latents_fingerprint()
        require_settings(settings.out, {"fingerprint": self.fingerprint})
        self.classes = {name: number for number, name in enumerate(class_names)}
        self.numbered = not any(name.isdecimal() for name in class_names)
        """True if a numeric class label is an index into the names; False if the names are numbers."""
        self.policy = settings.policy()

    def run(
        self,
        unit: WorkUnit,
        on_progress: OnProgress = lambda kind, images: None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> EncodingSummary:
        """Write the missing shards of a work unit, until `is_stopping` returns True between two shards."""
        summary = EncodingSummary()
        try:
            archive = self.images.stamp(unit.input) if isinstance(self.images, TarShards) else None
            shard = self.images.open(unit.input)
        except UnreadableShard as error:
            why = f"{self.images.names[unit.input]}: {error}"
            mark_unreadable(self.settings.out, unit.input, why)
            summary.unreadable.append(why)
            return summary
        mark_readable(self.settings.out, unit.input)
        size_known = isinstance(shard, Sized)
        if isinstance(shard, Sized):
            on_progress("found", -(-len(shard) // unit.parts))
        with ThreadPoolExecutor(_DECODERS) as decoders:
            for number, piece, last in split_pieces(shard.entries(0), self.settings.per_shard):
                if is_stopping():
                    break
                if number % unit.parts != unit.part:
                    continue
                if not size_known:
                    on_progress("found", len(piece))
                path = piece_path(self.settings.out, unit.input, number, self.settings.format)
                existing = complete_record(path)
                if existing is not None:
                    on_progress("done", _num_images(existing))
                record = existing or self._write(path, piece, last, archive, decoders, on_progress)
                summary.add_shard(record, new=existing is None)
        return summary

    def _write(
        self,
        path: Path,
        piece: list[Entry],
        last: bool,
        archive: dict[str, Any] | None,
        decoders: ThreadPoolExecutor,
        on_progress: OnProgress,
    ) -> dict[str, Any]:
        """Encode a piece and write its latent shard; return the shard's record.

        Args:
            archive: stamp of the archive of the piece, if it is of one.
        """
        keys = unique_keys([escape_text(entry.key) for entry in piece])
        entries: dict[int, LatentEntry] = {}
        latents: dict[str, torch.Tensor] = {}
        skipped: dict[int, str] = {}
        samples: list[SampleRecord] = []
        origins: Counter[RatioOrigin] = Counter()

        def usable() -> Iterator[ImageToEncode[tuple[int, _Prepared]]]:
            for number, (prepared, sample) in enumerate(self._prepared(piece, decoders)):
                samples.append(sample)
                if isinstance(prepared, str):
                    skipped[number] = prepared
                    on_progress("done", 1)
                else:
                    yield ImageToEncode((number, prepared), prepared.pixels, prepared.ratio)

        for batch in encode_by_ratio(self.tokenizer, usable(), self.settings.batch_size):
            for (number, prepared), latent in batch:
                if not torch.isfinite(latent).all():
                    skipped[number] = NOT_FINITE
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
                origins[prepared.origin] += 1
            on_progress("done", len(batch))
        return write_shard(
            path,
            latents,
            [entries[number] for number in sorted(entries)],
            self.fingerprint,
            last=last,
            origins=origins_to_json(origins),
            skipped=[{"key": piece[number].key, "why": skipped[number]} for number in sorted(skipped)],
            archive=archive,
            samples=[s._replace(skipped=skipped.get(number, "")) for number, s in enumerate(samples)],
        )

    def _prepared(
        self, piece: list[Entry], decoders: ThreadPoolExecutor
    ) -> "Iterator[tuple[_Prepared | str, SampleRecord]]":
        """Yield entries in order, decoded a few batches ahead; for unusable entries, the reason."""
        ahead: deque[Future[tuple[_Prepared | str, SampleRecord]]] = deque()
        choices = self.policy.choose([entry.labels for entry in piece])
        for entry, choice in zip(piece, choices, strict=True):
            ahead.append(decoders.submit(self._prepare, entry, choice))
            if len(ahead) > 2 * self.settings.batch_size + _DECODERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _prepare(
        self, entry: Entry, choice: RatioChoice | UserError | None
    ) -> "tuple[_Prepared | str, SampleRecord]":
        size, modified = file_stamp(entry.path)  # before reading, so that a later change is noticed
        content: str | None = NOT_READ
        prepared: _Prepared | str
        try:
            if entry.damage:
                raise UserError(entry.damage)
            label = self._label(entry.labels.category)
            content = None
            encoded = entry.read()
            content = hash_content(encoded)
            prepared = self._decode(encoded, choice, label)
        except (OSError, UserError) as error:
            prepared = str(error)
        labels = hash_labels(entry.key, entry.labels)
        return prepared, SampleRecord(entry.key, labels, size, modified, content, "")

    def _decode(self, encoded: bytes, choice: RatioChoice | UserError | None, label: int) -> "_Prepared":
        image = decode_image(encoded)
        if isinstance(choice, UserError):
            raise choice
        choice = choice or self.policy.choose_by_pixels(image)
        if choice.ratio not in self.tokenizer.config["ratios"]:
            raise UserError(f"the tokenizer has no ratio {choice.ratio}")
        pixels = image_to_bytes(resize_center_crop(image, self.settings.size))
        return _Prepared(pixels, choice.ratio, label, choice.origin)

    def _label(self, category: str) -> int:
        if category in self.classes:
            return self.classes[category]
        if not category and list(self.classes) == DEFAULT_CLASSES:
            return 0
        if self.numbered and category.isdecimal() and int(category) < len(self.classes):
            return int(category)
        raise UserError(
            f"class {category!r} is not one of the {len(self.classes)} classes"
            if category
            else "the image has no class"
        )


class _Prepared(NamedTuple):
    pixels: torch.Tensor
    """(3, size, size) uint8."""
    ratio: int
    label: int
    origin: RatioOrigin


def _num_images(record: dict[str, Any]) -> int:
    return len(record["latents"]) + len(record["skipped"])
