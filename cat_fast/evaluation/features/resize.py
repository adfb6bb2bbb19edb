"""The bilinear resize of TensorFlow 1, which FID's published figures are made with.

Output pixel i samples the input at i * in / out: not at pixel centres, and without antialiasing. Other resize
filters change FID by several points (Parmar et al., 2022).
"""

import torch
from torch import Tensor


def resize_bilinear_tf1(images: Tensor, side: int) -> Tensor:
    """Return images (B, C, H, W), floating point, as (B, C, side, side)."""
    rows = _neighbours(images.shape[2], side, images)
    columns = _neighbours(images.shape[3], side, images)
    images = _interpolate(images, 3, *columns)
    return _interpolate(images, 2, *rows)


def _neighbours(size: int, side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each output pixel the two input pixels and the weight of the second."""
    # In float32, as TensorFlow: the weights of some pixels depend on it.
    positions = torch.arange(side, dtype=torch.float32, device=like.device) * torch.tensor(size / side)
    first = positions.long()
    return first, (first + 1).clamp_max(size - 1), (positions - first).to(like.dtype)


def _interpolate(images: Tensor, dim: int, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    before = images.index_select(dim, first)
    shape = [1] * images.ndim
    shape[dim] = len(weight)
    return before + (images.index_select(dim, second) - before) * weight.view(shape)
