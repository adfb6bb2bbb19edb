"""JPEG size as a complexity signal: the published baseline for images without a description.

It responds to noise and ignores content: its published correlation with the best ratio is 0.31 on COCO,
against 0.55 for scores from captions.
"""

from typing import TYPE_CHECKING

from cat_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

JPEG_SIDE = 512
"""Side, in pixels, of the images whose JPEG size is compared with thresholds."""


def jpeg_bytes(image: "Tensor") -> int:
    """Return the JPEG size in bytes of `image`, uint8 (3 or 1, H, W), at torchvision's default quality 75.

    Raises:
        UserError: wrong shape or dtype.
    """
    import torch
    from torchvision.io import encode_jpeg

    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise UserError(
            f"expected a uint8 image (3, H, W) or (1, H, W), got {image.dtype} {tuple(image.shape)}"
        )
    return encode_jpeg(image.cpu().contiguous()).numel()
