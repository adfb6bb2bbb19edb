"""Reconstruction errors as complexity signals: the paper's MSE and LPIPS baselines (Table 9).

The paper reconstructs with sd-vae-ft-mse. This package does not know tokenizers: the model is a callable.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Reconstruct = Callable[[Tensor], Tensor]
"""Returns the reconstruction of images (B, 3, H, W) in [-1, 1], such as `lambda x: vae(x).sample`."""
Distance = Callable[[Tensor, Tensor], Tensor]
"""Returns the perceptual distance per image, (B,)."""


class ReconstructionErrors(NamedTuple):
    """Errors per image, (B,); higher for more complex images."""

    mse: Tensor
    """Mean squared error of pixels in [0, 1]."""
    distance: Tensor
    """Perceptual distance."""


@torch.no_grad()
def reconstruction_errors(
    images: Tensor, reconstruct: Reconstruct, distance: Distance
) -> ReconstructionErrors:
    """Return the errors of images, (B, 3, H, W) in [-1, 1], by a model."""
    found = reconstruct(images).clamp(-1, 1)
    return ReconstructionErrors((found - images).square().mean((1, 2, 3)) / 4, distance(found, images))
