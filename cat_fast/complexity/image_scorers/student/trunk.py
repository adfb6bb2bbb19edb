"""The first three convolutions of a pretrained AlexNet, frozen, as features of an image's textures and parts.

The weights are those of the shift-tolerant AlexNet of Ghildyal and Liu (ECCV 2022), from the package
`stlpips-pytorch` (BSD-2-Clause), whose first convolution and the blur after it are one convolution here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cat_fast.errors import UserError

SIDE = 160
"""Side of the square that the image is resized to, whatever its aspect ratio."""
_MEAN = (-0.030, -0.088, -0.188)
_STD = (0.458, 0.448, 0.450)
"""Normalization of pixels in [-1, 1], as of LPIPS."""
_SHAPES = {
    "conv1.weight": (64, 3, 13, 13),
    "conv1.bias": (64,),
    "conv2.weight": (192, 64, 5, 5),
    "conv2.bias": (192,),
    "conv3.weight": (384, 192, 3, 3),
    "conv3.bias": (384,),
}


@dataclass(frozen=True)
class Trunk:
    """Frozen convolutions.

    Args:
        weights: float16 arrays named and shaped as in `_SHAPES`.

    Raises:
        ValueError: a weight is missing or has another shape.
    """

    weights: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        for name, shape in _SHAPES.items():
            if name not in self.weights or self.weights[name].shape != shape:
                raise ValueError(f"expected {name} with shape {shape}")

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The weights in float32."""
        return {name: torch.from_numpy(np.asarray(self.weights[name])).float() for name in _SHAPES}

    @classmethod
    def from_published(cls, state: Mapping[str, Tensor]) -> "Trunk":
        """Return the trunk of a state dict of `stlpips-pytorch`'s AlexNet."""
        try:
            # The blur after the first convolution has stride 2: a convolution of 11 and 3 taps is one of 13.
            kernel, blur = state["net.slice1.0.weight"], state["net.slice1.1.filt"][:1]
            merged = F.conv2d(kernel.flatten(0, 1)[:, None], blur.flip(2, 3), padding=2)
            arrays = {
                "conv1.weight": merged.reshape(64, 3, 13, 13),
                "conv1.bias": state["net.slice1.0.bias"],
                "conv2.weight": state["net.slice2.5.weight"],
                "conv2.bias": state["net.slice2.5.bias"],
                "conv3.weight": state["net.slice3.9.weight"],
                "conv3.bias": state["net.slice3.9.bias"],
            }
        except KeyError as error:
            raise UserError(f"not a state dict of stlpips-pytorch's AlexNet: {error} is missing") from error
        return cls({name: value.half().numpy() for name, value in arrays.items()})

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Return the statistics of all channels of an image, float32 (1920,).

        They are the square roots of mean, standard deviation and maximum over the image, per convolution.

        Args:
            pixels: uint8 (SIDE, SIDE, 3).
        """
        x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        x = (x - torch.tensor(_MEAN).view(1, 3, 1, 1)) / torch.tensor(_STD).view(1, 3, 1, 1)
        weights = self.tensors
        found = []
        for number, (stride, padding) in enumerate(((2, 4), (1, 2), (1, 1)), start=1):
            if number > 1:
                x = _blur(_max_pool(x))
            x = F.conv2d(x, weights[f"conv{number}.weight"], weights[f"conv{number}.bias"], stride, padding)
            rows = F.relu_(x)[0].flatten(1)
            found += [rows.mean(1), _std(rows), rows.amax(1)]
        return torch.cat(found).clamp_min(0).sqrt().numpy()


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
