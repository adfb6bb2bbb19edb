"""Image-text pairs, from an index or from streams of shards."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from cat_fast.data.images.index import ImageRecord, read_index
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop
from cat_fast.data.sampling.step_plan import PerRankPlan
from cat_fast.data.streams.decoding import CropSettings, crop_pixels, crop_seed
from cat_fast.data.streams.formats.base import Entry, Labels, Shard, ShardSet
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.tar import TarShards, list_shards
from cat_fast.data.streams.plan import Mix
from cat_fast.data.streams.source import StreamSource
from cat_fast.errors import UserError
from cat_fast.training.config.dual_token import ANY_RATIO, PairDataConfig
from cat_fast.training.runtime.collective_errors import on_each, raise_together
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.tokenizer.image_source import load_source, loader_amounts, save_source

T = TypeVar("T")


class PairBatch(NamedTuple):
    """A rank's pairs of a step."""

    images: Tensor
    """(B, 3, H, W) in [-1, 1]."""
    captions: list[str]
    keys: list[str]
    amounts: Sequence[float] = ()
    """Values of `PairSource.amounts`."""


class PairSource(Protocol):
    """Training pairs of a rank, in batches of equal size on all ranks."""

    amounts: ClassVar[Sequence[str]]
    """Names of the loader metrics of a batch, summed over ranks."""
    identity: dict[str, Any]
    """Settings that a resumed run must share."""

    def batch(self, step: int) -> PairBatch:
        """Return the next batch, that of a step.

        Raises:
            UserError: too few images can be read.
        """
        ...

    def undraw(self) -> None:
        """Restore the position from before the last batch, for a checkpoint. No batch follows."""
        ...

    def save(self, folder: Path) -> None:
        """Write the position to a checkpoint folder."""
        ...

    def load(self, folder: Path) -> None:
        """Resume from a checkpoint folder."""
        ...

    def close(self) -> None:
        """Stop helper processes."""
        ...


def open_pairs(config: PairDataConfig, seed: int, ranks: Ranks) -> PairSource:
    """Collective: return the pairs that a configuration describes.

    Raises:
        UserError: they are missing, lack captions, or cannot be divided among the ranks.
    """
    if not config.index and not config.shards:
        raise UserError("data: no pairs; set data.index or data.shards")
    if config.shards:
        return StreamedPairs(config, seed, ranks)
    return on_each(lambda: IndexedPairs(config, seed, ranks), ranks)


class IndexedPairs:
    """Pairs of an index. Epoch e visits captions in a permutation drawn from the seed and e.

    Images with equal captions take turns by chance, one per epoch: in a batch, each would be a negative of
    the other's text. Captions of many images also do not outweigh the others.

    An image that cannot be read is reported and replaced by another of its caption, else by one of a caption
    that no other place of the batch can have. So the captions of a batch differ without an exchange between
    ranks.

    Raises:
        UserError: the index cannot be read, pairs lack captions, or there are fewer captions than a batch.
    """

    amounts: ClassVar[Sequence[str]] = ()

    def __init__(self, config: PairDataConfig, seed: int, ranks: Ranks) -> None:
        self.config, self.seed, self.ranks = config, seed, ranks
        self.records = read_pairs(config.index, "data.index")
        by_caption: dict[str, list[ImageRecord]] = {}
        for record in self.records:
            by_caption.setdefault(record.caption, []).append(record)
        self._groups = list(by_caption.values())
        if len(self._groups) < config.batch_size:
            raise UserError(
                f"data.batch_size: {config.batch_size} is more than the {len(self._groups)} different "
                f"captions of {config.index}; lower it"
            )
        _pairs_per_rank(config, ranks)
        labels = ((record.key, record.caption) for record in self.records)
        self.identity: dict[str, Any] = {
            "data.index": len(self.records),
            **pairs_identity(labels, "data.index"),
        }
        self._crops = CropSettings(config.crop_size, config.min_crop)
        self._problems = ProblemLog()

    def batch(self, step: int) -> PairBatch:
        """Return the batch of a step; the last, incomplete batch of an epoch is left out.

        Raises:
            UserError: none of the images for a place of the batch can be read.
        """
        size = self.config.batch_size
        epoch, number = divmod(step, len(self._groups) // size)
        random = np.random.default_rng([self.seed, epoch, 0, 9])
        order = np.roll(random.permutation(len(self._groups)), -number * size)
        turns = random.random(len(self._groups))
        # A caption is a candidate for one place only, so replacements on two ranks cannot be equal.
        places = range(self.ranks.rank, size, self.ranks.world_size)
        found = [self._first_readable(order[place::size], turns, epoch) for place in places]
        return PairBatch(
            images=_normalised(torch.stack([crop for _, crop in found])),
            captions=[record.caption for record, _ in found],
            keys=[record.key for record, _ in found],
        )

    def _first_readable(
        self, captions: np.ndarray, turns: np.ndarray, epoch: int
    ) -> tuple[ImageRecord, Tensor]:
        """Return the first image that can be read, and its crop.

        Args:
            captions: numbers of captions, in order of preference.
            turns: in [0, 1), by caption: which of its images comes first.
        """
        failure: UserError | None = None
        for caption in captions:
            images = self._groups[caption]
            first = int(turns[caption] * len(images))
            for turn in range(len(images)):
                record = images[(first + turn) % len(images)]
                try:
                    return record, self._crop(record, epoch)
                except UserError as error:
                    failure = error
                    self._problems.report(f"data.index: {record.key}", str(error))
        raise UserError(
            "data.index: no image for a place of the batch can be read; number of captions tried: "
            f"{len(captions)}, the last: {failure}. Repair the images, or lower data.batch_size"
        ) from failure

    def _crop(self, record: ImageRecord, epoch: int) -> Tensor:
        rng = np.random.default_rng(crop_seed(self.seed, epoch, 1, record.key))
        # Captions may name sides, and letters must stay readable: no flips.
        return torch.from_numpy(crop_pixels(load_image(record.path), rng, False, self._crops))

    def undraw(self) -> None:
        """Do nothing: the position is the step."""

    def save(self, folder: Path) -> None:
        """Do nothing: the position is the step."""

    def load(self, folder: Path) -> None:
        """Do nothing: the position is the step."""

    def close(self) -> None:
        """Do nothing: images are read in this process."""


class StreamedPairs:
    """Pairs of webdataset archives, with the guarantees of `cat_fast.data.streams`: exact resume included.

    Samples without a caption are skipped and counted.

    Raises:
        UserError: the archives are missing or differ between ranks.
    """

    amounts: ClassVar[Sequence[str]] = ("data_seconds", "loader_images_per_second", "skipped_samples")

    def __init__(self, config: PairDataConfig, seed: int, ranks: Ranks) -> None:
        self.ranks = ranks
        self.identity: dict[str, Any] = {"data.index": None}  # the source compares its shards
        problems = ProblemLog()
        count = on_each(lambda: _pairs_per_rank(config, ranks), ranks)
        shards = on_each(lambda: _open_shards(config, problems), ranks)
        same = ranks.broadcast(shards.fingerprint) == shards.fingerprint
        different = UserError("data.shards: differ from rank 0's: all ranks must see the same files")
        raise_together(None if same else different, ranks)
        self.source = StreamSource(
            shards,
            None,
            lambda shares: PerRankPlan(shares, count, ranks.world_size, seed),
            Mix({ANY_RATIO: 1.0}),
            CropSettings(config.crop_size, config.min_crop, flips=False),
            config.stream,
            ranks.rank,
            ranks.world_size,
            seed,
            problems,
        )
        self._position: Callable[[], dict[str, Any]] = self.source.state_dict
        self._before_draw = self._position

    def batch(self, step: int) -> PairBatch:
        """Return the next batch.

        Raises:
            UserError: no pair is usable.
        """
        self._before_draw = self.source.snapshot()
        batch = self.source.batch()
        amounts = loader_amounts([batch], self.ranks.world_size)
        return PairBatch(
            images=_normalised(batch.images),
            captions=list(batch.captions),
            keys=list(batch.keys),
            amounts=[amounts[name] for name in self.amounts],
        )

    def undraw(self) -> None:
        self._position = self._before_draw

    def save(self, folder: Path) -> None:
        save_source(self._position(), folder, self.ranks)

    def load(self, folder: Path) -> None:
        load_source(self.source, folder)

    def close(self) -> None:
        """Stop the processes that read images."""
        self.source.close()


class CaptionedShards:
    """`ShardSet` whose samples without a caption are unusable."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards, self.names = shards, shards.names
        self.fingerprint, self.extent = shards.fingerprint, shards.extent

    def open(self, index: int) -> Shard:
        return _CaptionedShard(self.shards.open(index))

    def labels(self, index: int) -> list[Labels] | None:
        return self.shards.labels(index)


class _CaptionedShard:
    def __init__(self, shard: Shard) -> None:
        self.shard, self.name = shard, shard.name

    def entries(self, first: int) -> Iterator[Entry]:
        for entry in self.shard.entries(first):
            if entry.damage or entry.labels.caption.strip():
                yield entry
            else:
                yield replace(entry, damage="it has no caption")


def _open_shards(config: PairDataConfig, problems: ProblemLog) -> ShardSet:
    remote = Remote(config.stream, problems)
    return CaptionedShards(TarShards(list_shards(config.shards, remote), remote, problems, config.image))


def _pairs_per_rank(config: PairDataConfig, ranks: Ranks) -> int:
    if config.batch_size % ranks.world_size:
        raise UserError(
            f"data.batch_size: {config.batch_size} pairs per step cannot be divided among "
            f"{ranks.world_size} ranks; use a multiple"
        )
    return config.batch_size // ranks.world_size


def _normalised(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def read_pairs(index: str, key: str) -> list[ImageRecord]:
    """Return the records of an index, all of which have a caption.

    Raises:
        UserError: the index cannot be read, is empty, or a caption is missing.
    """
    records = read_index(index)
    if not records:
        raise UserError(f"{key}: {index} contains no images")
    if without := next((record for record in records if not record.caption.strip()), None):
        raise UserError(f"{key}: {index}: {without.key} has no caption; the stage trains on image-text pairs")
    return records


def pairs_identity(labels: Iterable[tuple[str, str]], key: str) -> dict[str, str]:
    """Return the setting that identifies pairs in a record of a run, wherever their index is.

    Args:
        labels: key and caption of each pair, in order.
        key: setting that names their index.
    """
    content = "\n".join(json.dumps(label) for label in labels)
    return {f"SHA-256 of the keys and captions of {key}": sha256(content.encode()).hexdigest()}


def held_out_pairs(config: PairDataConfig, count: int) -> tuple[Tensor, list[str]]:
    """Return images (N, 3, H, W) and captions of held-out pairs with different captions, the first `count`.

    Raises:
        UserError: the index or an image cannot be read.
    """
    chosen: dict[str, ImageRecord] = {}
    for record in spread(read_pairs(config.held_out, "data.held_out"), count):
        chosen.setdefault(record.caption, record)
    records = list(chosen.values())[:count]
    images = [
        image_to_tensor(resize_center_crop(load_image(record.path), config.crop_size)) for record in records
    ]
    return torch.stack(images), [record.caption for record in records]


def spread(pairs: Sequence[T], count: int) -> list[T]:
    """Return pairs in an order whose start is spread over all, the same in every run.

    Args:
        count: number of pairs that will be used.
    """
    order = np.random.default_rng([count, 0, 0, 10]).permutation(len(pairs))
    return [pairs[i] for i in order]
