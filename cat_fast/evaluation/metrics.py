"""Distances between images; all take (B, 3, H, W) in [-1, 1] and return one value an image, (B,)."""

from torch import Tensor


def psnr(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: 10 log10(range^2 / MSE) with range 2; equal images give 100 dB."""
    mse = (x_BCHW.clamp(-1, 1) - y_BCHW.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * (4 / mse.clamp_min(4e-10)).log10()


def mean_colour_psnr(x_BCHW: Tensor) -> Tensor:
    """PSNR of predicting each image by its own mean colour: what a reconstruction has to beat."""
    return psnr(x_BCHW, x_BCHW.mean((2, 3), keepdim=True).expand_as(x_BCHW))
