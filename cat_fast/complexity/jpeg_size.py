"""The pixel signal the method was published against: how many bytes an image has as a JPEG.

It is the fallback where an image has no description. Bytes see noise and miss meaning: their published
correlation with the best ratio is 0.31 on COCO, against 0.55 for scores from captions.
"""

from typing import TYPE_CHECKING

from cat_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

JPEG_SIDE = 512
"""The side in px of the images that `JPEG_THRESHOLDS` hold for."""
JPEG_THRESHOLDS = (38761, 65837)
"""Published borders in bytes: files up to the first get 32x, above the second 8x, between them 16x."""


def jpeg_bytes(image: "Tensor") -> int:
    """Size in bytes of `image` (3 or 1, H, W), uint8, as a JPEG of torchvision's default quality 75.

    Raises:
        UserError: another shape or dtype.
    """
    import torch
    from torchvision.io import encode_jpeg

    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise UserError(
            f"expected a uint8 image (3, H, W) or (1, H, W), got {image.dtype} {tuple(image.shape)}"
        )
    return encode_jpeg(image.cpu().contiguous()).numel()


def jpeg_ratio(image: "Tensor") -> int:
    """Compression ratio 8, 16 or 32 of `image` (3 or 1, 512, 512), uint8, from its JPEG size.

    Raises:
        UserError: another shape or dtype; the thresholds mean nothing at other sizes.
    """
    if tuple(image.shape[-2:]) != (JPEG_SIDE, JPEG_SIDE):
        raise UserError(
            f"JPEG sizes are judged at {JPEG_SIDE} x {JPEG_SIDE} px, got {tuple(image.shape)}:"
            " resize and crop first"
        )
    size = jpeg_bytes(image)
    low, high = JPEG_THRESHOLDS
    return 32 if size <= low else 16 if size <= high else 8
