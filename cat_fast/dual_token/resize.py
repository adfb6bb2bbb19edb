"""Resizing of image tensors, the same for every part of the tokenizer."""

import torch.nn.functional as F
from torch import Tensor


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images (B, 3, H, W) in [-1, 1], bicubic with antialiasing, clipped to their range."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
