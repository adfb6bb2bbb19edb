"""A source of images that holds them in memory."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cat_fast.data.image_batch import ImageBatch, fingerprint, last_part
from cat_fast.data.images.crops import CropDataset
from cat_fast.data.sampling.ratio_sampler import RatioSampler
from cat_fast.errors import UserError


class MemorySource:
    """Implements `ImageSource` for pictures in memory, which are cropped in the training process.

    Args:
        keys: a name for each picture of `crops`, such as its path.
        rng: the randomness of a batch's crops, by its number.
        skipped: pictures that this rank counts as left out.
    """

    def __init__(
        self,
        sampler: RatioSampler,
        crops: CropDataset,
        keys: Sequence[str],
        rank: int,
        rng: Callable[[int], np.random.Generator],
        skipped: int = 0,
    ) -> None:
        self.sampler, self.crops, self.keys, self.rank, self.rng = sampler, crops, keys, rank, rng
        self.ratios = sorted(sampler.pools)
        self.skipped = skipped
        chosen = zip(keys, sampler.chosen.tolist(), strict=True)
        self.fingerprint = fingerprint(f"{last_part(key)} {ratio}" for key, ratio in chosen)

    def batch(self, step: int) -> ImageBatch:
        start = time.perf_counter()
        ratio, indices, counts = self.sampler.plan()[self.rank]
        pictures = self.crops.batch(indices, self.rng(step))
        seconds = time.perf_counter() - start
        return ImageBatch(
            ratio=ratio,
            counts=counts,
            images=pictures,
            keys=[self.keys[index] for index in indices],
            data_seconds=seconds,
            images_per_second=len(indices) / seconds,
            skipped=self.skipped,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "pictures": {"count": len(self.keys), "fingerprint": self.fingerprint},
            "sampler": self.sampler.state_dict(),
        }

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        state = self.state_dict()
        return lambda: state

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Raises UserError if the states speak of other pictures, or of other ratios for them."""
        there = states[0]["pictures"]
        if there["fingerprint"] != self.fingerprint:
            raise UserError(
                f"the checkpoint is of {there['count']} other pictures than these {len(self.keys)}, or of "
                "other ratios: give the same index, less the lines of pictures that could not be read then, "
                "or start a new run"
            )
        self.sampler.load_state_dict(states[0]["sampler"])

    def close(self) -> None:
        pass
