"""Interface of the feature networks."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FeatureNetwork(nn.Module, ABC):
    """Frozen network from uint8 images to named feature vectors.

    Subclasses define `sizes` and `resize`, and `_features`.
    """

    name: ClassVar[str]
    """Name of network and training set, part of the names of its figures."""
    sizes: dict[str, int]
    """Number of features by output: `pool` for distances; `spatial` and `logits` of networks with them."""
    resize: ClassVar[str]
    """Filter and size that images are scaled with, for the record of a result."""

    def freeze(self) -> None:
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FeatureNetwork":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs in `sizes`, each (B, size) float32, of images (B, 3, H, W) uint8."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        return self._features(images)

    @abstractmethod
    def _features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of checked images."""


def normalise(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) with levels in [0, 255], less ImageNet's mean and over its deviation."""
    mean, std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (images / 255 - mean) / std
