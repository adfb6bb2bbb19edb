"""Forward pass of the student's convolutions, in torch."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_MEAN = (-0.030, -0.088, -0.188)
_STD = (0.458, 0.448, 0.450)
"""Normalization of pixels in [-1, 1], as of LPIPS."""


def as_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return weights in float32."""
    return {name: torch.from_numpy(np.asarray(value)).float() for name, value in weights.items()}


@torch.no_grad()
def channel_statistics(pixels: np.ndarray, weights: Mapping[str, Tensor]) -> np.ndarray:
    """Return the features of `Trunk.features`, float32 (1920,), of an image, uint8 (H, W, 3)."""
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    x = (x - torch.tensor(_MEAN).view(1, 3, 1, 1)) / torch.tensor(_STD).view(1, 3, 1, 1)
    found = []
    for number, (stride, padding) in enumerate(((2, 4), (1, 2), (1, 1)), start=1):
        if number > 1:
            x = _blur(_max_pool(x))
        x = F.conv2d(x, weights[f"conv{number}.weight"], weights[f"conv{number}.bias"], stride, padding)
        rows = F.relu_(x)[0].flatten(1)
        found += [rows.mean(1), _std(rows), rows.amax(1)]
    return torch.cat(found).clamp_min(0).sqrt().numpy()


def merge_blur(kernel: Tensor, blur: Tensor) -> Tensor:
    """Return one convolution of 13 taps (C, 3, 13, 13) for one of 11 and the blur of stride 2 after it."""
    merged = F.conv2d(kernel.flatten(0, 1)[:, None], blur.flip(2, 3), padding=2)
    return merged.reshape(len(kernel), 3, 13, 13)


def _std(rows: Tensor) -> Tensor:
    """Return the standard deviation of each row, in two passes, which is several times faster than `std`."""
    return ((rows - rows.mean(1, keepdim=True)).square_().sum(1) / (rows.shape[1] - 1)).sqrt_()


def _max_pool(x: Tensor) -> Tensor:
    """Return the maximum of 3 x 3 values at each place; one axis after the other is several times faster."""
    x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])
    return torch.maximum(torch.maximum(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])


def _blur(x: Tensor) -> Tensor:
    """Return the binomial 3 x 3 blur with stride 2, which makes the network tolerant of shifts."""
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    height, width = ((side - 3) // 2 * 2 + 1 for side in x.shape[-2:])
    x = (x[..., :width:2] + 2 * x[..., 1 : width + 1 : 2] + x[..., 2 : width + 2 : 2]) / 4
    return (x[..., :height:2, :] + 2 * x[..., 1 : height + 1 : 2, :] + x[..., 2 : height + 2 : 2, :]) / 4
