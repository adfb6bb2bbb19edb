"""Where training takes its pictures from: what every source offers, and the one that holds them in memory."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cat_fast.data.crops import CropDataset
from cat_fast.data.ratio_sampler import RatioSampler
from cat_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PictureBatch:
    """What one rank trains on in one step."""

    ratio: int
    pixels: Tensor
    """(B, 3, H, W) on the CPU: uint8, or float32 in [-1, 1]."""
    keys: list[str]
    """Names of the pictures, such as a diagnosis would give."""
    data_seconds: float
    """How long the training process waited for them."""
    pictures_per_second: float
    """How many such pictures this rank's loader could make: a step should need fewer."""
    counts: bool = True
    """Whether the step is trained on them: not where a rank only keeps the others company."""
    skipped: int = 0
    """Samples that this rank has passed over since training began, as they could not be used."""

    def on(self, device: torch.device) -> Tensor:
        """The pictures on a device, (B, 3, H, W) float32 in [-1, 1], channels last."""
        pixels = self.pixels.to(device, memory_format=torch.channels_last, non_blocking=True)
        return pixels.float().div_(127.5).sub_(1.0) if pixels.dtype == torch.uint8 else pixels


class PictureSource(Protocol):
    """Batches of one rank, in the order of the steps."""

    @property
    def ratios(self) -> list[int]:
        """Those that batches can have, ascending; the same on all ranks."""
        ...

    def batch(self, step: int) -> PictureBatch:
        """The next one; its number `step` seeds what is random in it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, as JSON."""
        ...

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states that all ranks of a run saved, in their order."""
        ...

    def close(self) -> None:
        """End processes and threads."""
        ...


class MemorySource:
    """Implements `PictureSource` for pictures in memory, which are cropped in the training process.

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

    def batch(self, step: int) -> PictureBatch:
        start = time.perf_counter()
        ratio, indices, counts = self.sampler.plan()[self.rank]
        pictures = self.crops.batch(indices, self.rng(step))
        seconds = time.perf_counter() - start
        return PictureBatch(
            ratio=ratio,
            counts=counts,
            pixels=pictures,
            keys=[self.keys[index] for index in indices],
            data_seconds=seconds,
            pictures_per_second=len(indices) / seconds,
            skipped=self.skipped,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "pictures": {"count": len(self.keys), "fingerprint": self.fingerprint},
            "sampler": self.sampler.state_dict(),
        }

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


def fingerprint(names: Iterable[str]) -> str:
    """Of names in their order."""
    # Those of files may be any bytes, which Python holds as lone surrogates.
    return hashlib.sha256("\n".join(names).encode(errors="surrogatepass")).hexdigest()[:16]


def last_part(name: str) -> str:
    """Of a path or URL: a set that has moved is the same set."""
    return name.rpartition("/")[2]
