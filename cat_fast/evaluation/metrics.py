"""Image metrics: (B, 3, H, W) in [-1, 1] -> one value per image, (B,)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PAIRS_PER_PASS = 2
"""Pairs of images per pass of a perceptual distance on a CPU: activations of more leave its caches."""


def perceptual_distances(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the distance of each pair of images (N, 3, H, W), (N,), a few at a time on a CPU."""
    size = PAIRS_PER_PASS if x.device.type == "cpu" else len(x)
    return torch.cat([network(*pair) for pair in zip(x.split(size), y.split(size), strict=True)])


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Return the PSNR in dB, 10 log10(range^2 / MSE) with range 2; equal images give 100 dB."""
    mse = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * (4 / mse.clamp_min(4e-10)).log10()


def mean_colour_psnr(x: Tensor) -> Tensor:
    """Return the PSNR of each image's mean colour as its reconstruction, a lower bound for useful ones."""
    return psnr(x, x.mean((2, 3), keepdim=True).expand_as(x))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the SSIM of Wang et al. (2004): Gaussian window of 11 x 11, sigma 1.5, means over RGB.

    Equal to scikit-image's `structural_similarity` with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=2`. H and W are at least 11.
    """
    x, y = x.clamp(-1, 1).double(), y.clamp(-1, 1).double()
    distance = torch.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1, dtype=torch.float64, device=x.device)
    taps = torch.exp(-distance.square() / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(z: Tensor) -> Tensor:
        flat = z.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).view(len(x), -1).mean(1).float()


_SSIM_RADIUS = 5
