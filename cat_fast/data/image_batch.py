"""The batch of images that a source yields, the trainer consumes and the losses read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    data_seconds: float = 0.0
    """Time that the training process waited for the images."""
    images_per_second: float = 0.0
    """Rate at which this rank's loader can make such images: a step should need fewer."""
    skipped: int = 0
    """Number of samples that this rank has skipped as unusable since training began."""

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
