"""Super-resolution of guides: bicubic, or a network such as Real-ESRGAN.

The paper's outcome (section 4.4): at large guides super-resolution wins, at small ones diffusion.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat_fast.dual_token.resize import resize
from cat_fast.errors import UserError, first_line
from cat_fast.models.device import find_device

Upscale = Callable[[Tensor, tuple[int, int]], Tensor]
"""Enlarges images (B, 3, h, w) in [-1, 1] to a size."""


def open_super_resolution(weights: Path, device: str = "auto") -> Upscale:
    """Return the upscaler of a weight file, such as RealESRGAN_x4plus.pth, through the package spandrel.

    The network is applied until the image is at least as large as wanted; the rest is a bicubic resize.

    Raises:
        UserError: the package or the file is missing, or the file is not a network that enlarges images.
    """
    place = find_device(device)
    if not weights.is_file():
        raise UserError(
            f"{weights}: no such file; expected weights of a super-resolution network, such as"
            " RealESRGAN_x4plus.pth"
        )
    try:
        from spandrel import ImageModelDescriptor, ModelLoader
    except ImportError as error:
        raise UserError(
            "super-resolution networks need the package spandrel: pip install spandrel, or compare with"
            " bicubic enlarging only"
        ) from error
    try:
        loaded: Any = ModelLoader().load_from_file(str(weights))
    except Exception as error:  # the package raises many types
        raise UserError(f"{weights}: not a known super-resolution network ({first_line(error)})") from error
    if not isinstance(loaded, ImageModelDescriptor) or loaded.scale < 2:
        raise UserError(f"{weights}: expected a network that enlarges images, got {type(loaded).__name__}")
    network = loaded.model.to(place).eval()

    def upscale(images: Tensor, size: tuple[int, int]) -> Tensor:
        x = images.to(place)
        with torch.inference_mode():
            while x.shape[-2] < size[0] or x.shape[-1] < size[1]:
                x = (network(x / 2 + 0.5) * 2 - 1).clamp(-1, 1)
        return resize(x, size)

    return upscale
