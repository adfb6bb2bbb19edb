"""Image metrics: (B, 3, H, W) in [-1, 1] -> one value per image, (B,)."""

from torch import Tensor


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Return the PSNR in dB, 10 log10(range^2 / MSE) with range 2; equal images give 100 dB."""
    mse = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * (4 / mse.clamp_min(4e-10)).log10()


def mean_colour_psnr(x: Tensor) -> Tensor:
    """Return the PSNR of each image's mean colour as its reconstruction, a lower bound for useful ones."""
    return psnr(x, x.mean((2, 3), keepdim=True).expand_as(x))
