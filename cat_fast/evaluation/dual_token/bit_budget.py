"""JPEG and WebP within the bits of a token sequence: the image is downscaled until a file fits."""

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cat_fast.data.images.io import image_to_tensor, tensor_to_image
from cat_fast.dual_token.resize import resize

FORMATS = ("jpeg", "webp")
_SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.09375, 0.0625)
_QUALITIES = (90, 75, 60, 45, 30, 20, 10, 5, 1)


def at_bits(image: Tensor, bits: float, image_format: str) -> Tensor | None:
    """Return the best reconstruction of an image by a file of at most `bits` bits, by mean squared error.

    All scales and qualities of a list are tried. The complete file counts, headers included: a decoder needs
    them, as it needs the weights of a tokenizer.

    Args:
        image: (3, H, W) in [-1, 1].
        image_format: one of `FORMATS`.

    Returns:
        (3, H, W), or None if no file is that small.
    """
    best: tuple[float, Tensor] | None = None
    height, width = image.shape[-2:]
    for scale in _SCALES:
        size = max(1, round(height * scale)), max(1, round(width * scale))
        small = tensor_to_image(resize(image[None], size)[0])
        data = _largest_file(small, bits, image_format)
        if data is None:
            continue
        with Image.open(io.BytesIO(data)) as coded:
            decoded = image_to_tensor(coded.convert("RGB"))
        back = resize(decoded[None].to(image), (height, width))[0]
        error = torch.mean((back - image) ** 2).item()
        if best is None or error < best[0]:
            best = error, back
    return None if best is None else best[1]


def _largest_file(image: Image.Image, bits: float, image_format: str) -> bytes | None:
    """Return the file of the highest quality that fits, None if none does."""
    options: dict[str, Any] = {"optimize": True} if image_format == "jpeg" else {"method": 6}
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, format=image_format, quality=quality, **options)
        if 8 * buffer.tell() <= bits:
            return buffer.getvalue()
    return None
