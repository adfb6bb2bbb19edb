"""The batch that image sources yield, the trainer consumes and the losses read; the protocol of sources."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of one ratio that a rank processes together."""

    ratio: int
    images: Tensor
    """(B, 3, H, W): uint8, or floating point in [-1, 1]."""
    keys: Sequence[str] = ()
    """Names of the images, for diagnostics."""
    counts: bool = True
    """False for a dummy batch that keeps collectives in sync."""
    data_seconds: float = 0.0
    """Time that the training process waited for the images."""
    images_per_second: float = 0.0
    """Rate at which this rank's loader can make such images: a step should need fewer."""
    skipped: int = 0
    """Number of samples that this rank has skipped as unusable since training began."""

    @property
    def count(self) -> int:
        """Number of images that the loss averages over: all, or 0 for a dummy batch."""
        return len(self.images) if self.counts else 0

    def on(self, device: torch.device) -> "ImageBatch":
        """Return the batch with its images on a device, float32 in [-1, 1], channels last."""
        images = self.images.to(device, memory_format=torch.channels_last, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float().div_(127.5).sub_(1.0)
        return replace(self, images=images)


class ImageSource(Protocol):
    """Batches of one rank, in the order of the steps."""

    @property
    def ratios(self) -> list[int]:
        """Ratios that batches can have, ascending; the same on all ranks."""
        ...

    def batch(self, step: int) -> ImageBatch:
        """Return the next batch; its number `step` seeds what is random in it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, as JSON."""
        ...

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Return a function that makes the `state_dict` of now, at any later time; cheap in every step."""
        ...

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Resume from the states that all ranks of a run saved, in their order."""
        ...

    def close(self) -> None:
        """End processes and threads."""
        ...


def fingerprint(names: Iterable[str]) -> str:
    """Return a hash of names in their order."""
    # Those of files may be any bytes, which Python holds as lone surrogates.
    return hashlib.sha256("\n".join(names).encode(errors="surrogatepass")).hexdigest()[:16]


def last_part(name: str) -> str:
    """Return the last part of a path or URL: a set that has moved is the same set."""
    return name.rpartition("/")[2]
