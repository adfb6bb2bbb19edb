"""Ideal low-pass with as many values per image as the latents: the reference for a tokenizer's PSNR."""

import numpy as np
from scipy.fft import dctn, idctn

SHARES = (0.8, 0.1, 0.1)
"""Shares of the values in Y, Cb and Cr."""
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def low_pass(image: np.ndarray, ratio: int, channels: int) -> np.ndarray:
    """Keep the lowest frequencies of an image (H, W, 3) in [0, 1], as many as its latents have values.

    Frequencies of the DCT are ranked by their radius in cycles per pixel.

    Args:
        ratio: compression ratio of the latents.
        channels: channels of the latents.
    """
    height, width, _ = image.shape
    values = channels * (height // ratio) * (width // ratio)
    radius = (np.arange(height)[:, None] / height) ** 2 + (np.arange(width)[None] / width) ** 2
    order = np.argsort(radius, axis=None, kind="stable")
    planes = image @ _YCBCR.T
    for plane, share in enumerate(SHARES):
        kept = np.zeros(height * width, dtype=bool)
        kept[order[: round(share * values)]] = True
        coefficients = dctn(planes[..., plane], norm="ortho") * kept.reshape(height, width)
        planes[..., plane] = idctn(coefficients, norm="ortho")
    return (planes @ np.linalg.inv(_YCBCR).T).clip(0, 1)
