"""Image-text pairs of an index, in batches that the step determines."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from cat_fast.data.images.index import ImageRecord, read_index
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop
from cat_fast.data.streams.decoding import CropSettings, crop_pixels, crop_seed
from cat_fast.errors import UserError
from cat_fast.training.config.dual_token import PairDataConfig
from cat_fast.training.runtime.ranks import Ranks

T = TypeVar("T")


class PairBatch(NamedTuple):
    """A rank's images of a step, and the texts of all ranks."""

    images: Tensor
    """(B, 3, H, W) in [-1, 1]."""
    texts: list[str]
    """Captions of the pairs of all ranks, W * B."""
    own: Tensor
    """(B,) int64: index of each image's caption among `texts`."""
    keys: list[str]


class Pairs:
    """Training pairs. Epoch e visits captions in a permutation drawn from the seed and e.

    Images with equal captions take turns by chance, one per epoch: in a batch, each would be a negative of
    the other's text. Captions of many images also do not outweigh the others.

    Every rank knows the pairs of all ranks, so that it reads the captions of the complete batch itself: the
    in-batch negatives of a contrastive loss need no communication.

    Raises:
        UserError: the index cannot be read, pairs lack captions, or there are fewer captions than a batch.
    """

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
        if config.batch_size % ranks.world_size:
            raise UserError(
                f"data.batch_size: {config.batch_size} pairs per step cannot be divided among "
                f"{ranks.world_size} ranks; use a multiple"
            )
        self._crops = CropSettings(config.crop_size, config.min_crop)

    def batch(self, step: int) -> PairBatch:
        """Return the batch of a step; the last, incomplete batch of an epoch is left out.

        Raises:
            UserError: an image cannot be read.
        """
        size, world, rank = self.config.batch_size, self.ranks.world_size, self.ranks.rank
        epoch, number = divmod(step, len(self._groups) // size)
        random = np.random.default_rng([self.seed, epoch, 0, 9])
        order = random.permutation(len(self._groups))
        turns = random.random(len(self._groups))
        rows = [
            self._groups[i][int(turns[i] * len(self._groups[i]))]
            for i in order[number * size : (number + 1) * size]
        ]
        own = rows[rank::world]
        images = torch.stack([self._crop(record, epoch) for record in own])
        return PairBatch(
            images=images.float() / 127.5 - 1,
            texts=[record.caption for record in rows],
            own=torch.arange(rank, size, world),
            keys=[record.key for record in own],
        )

    def _crop(self, record: ImageRecord, epoch: int) -> Tensor:
        rng = np.random.default_rng(crop_seed(self.seed, epoch, 1, record.key))
        # Captions may name sides, and letters must stay readable: no flips.
        return torch.from_numpy(crop_pixels(load_image(record.path), rng, False, self._crops))


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
