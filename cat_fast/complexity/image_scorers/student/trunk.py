"""The first three convolutions of a pretrained AlexNet, frozen, as features of an image's textures and parts.

The weights are those of the shift-tolerant AlexNet of Ghildyal and Liu (ECCV 2022), from the package
`stlpips-pytorch` (BSD-2-Clause), whose first convolution and the blur after it are one convolution here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cat_fast.errors import UserError

if TYPE_CHECKING:  # a scorer is named before it is used, which needs no torch
    from torch import Tensor

SIDE = 160
"""Side of the square that the image is resized to, whatever its aspect ratio."""
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
    def tensors(self) -> "dict[str, Tensor]":
        """The weights in float32."""
        from cat_fast.complexity.image_scorers.student.convolutions import as_tensors

        return as_tensors({name: self.weights[name] for name in _SHAPES})

    @classmethod
    def from_published(cls, state: "Mapping[str, Tensor]") -> "Trunk":
        """Return the trunk of a state dict of `stlpips-pytorch`'s AlexNet."""
        from cat_fast.complexity.image_scorers.student.convolutions import merge_blur

        try:
            kernel, blur = state["net.slice1.0.weight"], state["net.slice1.1.filt"][:1]
            arrays = {
                "conv1.weight": merge_blur(kernel, blur),
                "conv1.bias": state["net.slice1.0.bias"],
                "conv2.weight": state["net.slice2.5.weight"],
                "conv2.bias": state["net.slice2.5.bias"],
                "conv3.weight": state["net.slice3.9.weight"],
                "conv3.bias": state["net.slice3.9.bias"],
            }
        except KeyError as error:
            raise UserError(f"not a state dict of stlpips-pytorch's AlexNet: {error} is missing") from error
        return cls({name: value.half().numpy() for name, value in arrays.items()})

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Return the statistics of all channels of an image, float32 (1920,).

        They are the square roots of mean, standard deviation and maximum over the image, per convolution.

        Args:
            pixels: uint8 (SIDE, SIDE, 3).
        """
        from cat_fast.complexity.image_scorers.student.convolutions import channel_statistics

        return channel_statistics(pixels, self.tensors)
