"""Batch of images, passed from the source to the trainer and the losses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """A rank's batch of images at one ratio."""

    ratio: int
    images: Tensor
    """(B, 3, H, W): uint8, or floating point in [-1, 1]."""
    keys: Sequence[str] = ()
    """Names of the images, for diagnostics."""
    captions: Sequence[str] = ()
    """Caption of each image, empty for images without one."""
    data_seconds: float = 0.0
    """Time the training process waited for the images."""
    images_per_second: float = 0.0
    """Throughput of this rank's loader; it should exceed the rate of training."""
    skipped: int = 0
    """Number of unusable samples that this rank has skipped since training started."""

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images)

    def on(self, device: torch.device) -> "ImageBatch":
        """Return the batch with its images on a device, float32 in [-1, 1], channels last."""
        images = self.images.to(device, memory_format=torch.channels_last, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float().div_(127.5).sub_(1.0)
        return replace(self, images=images)
