"""FID and KID with features that need no download, for comparisons between our own runs.

    name, value = proxy_fid(originals, reconstructions)      # "proxy-FID-vgg16"

The figures cannot be compared with published ones, so their names begin with `proxy-`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from cat_fast.errors import UserError
from cat_fast.evaluation.distances.frechet import frechet_distance
from cat_fast.evaluation.distances.kernel import KernelDistance, kernel_distance
from cat_fast.evaluation.distances.statistics import FeatureStatistics
from cat_fast.evaluation.features.loading import load_network


def proxy_features(batches: Iterable[Tensor], device: str | torch.device = "cpu") -> Tensor:
    """Return the features (N, 512) of batches of images (B, 3, H, W): uint8, or floating point in [-1, 1].

    Floating-point images are rounded to the nearest of 256 levels, as if they had been saved.

    Raises:
        UserError: there are no images, or one has NaN.
    """
    network = load_network("proxy", device=device).network
    found = [network(as_bytes(batch).to(device))["pool"].cpu() for batch in batches]
    if not found:
        raise UserError("proxy features: there are no images")
    return torch.cat(found)


def proxy_fid(
    first: Iterable[Tensor], second: Iterable[Tensor], device: str | torch.device = "cpu"
) -> tuple[str, float]:
    """Return the name and the value of the Fréchet distance between two sets of images."""
    return "proxy-FID-vgg16", fid_of_features(proxy_features(first, device), proxy_features(second, device))


def proxy_kid(
    first: Iterable[Tensor], second: Iterable[Tensor], device: str | torch.device = "cpu"
) -> tuple[str, KernelDistance]:
    """Return the name and the value of KID between two sets of images, with its 95 % interval."""
    return "proxy-KID-vgg16", kernel_distance(proxy_features(first, device), proxy_features(second, device))


def fid_of_features(first: Tensor, second: Tensor) -> float:
    """Return the Fréchet distance between two sets of features, (N, D) and (M, D)."""
    gaussians = []
    for features in (first, second):
        statistics = FeatureStatistics(features.shape[1])
        statistics.update(features)
        gaussians.append(statistics.gaussian())
    return frechet_distance(*gaussians)


def as_bytes(images: Tensor) -> Tensor:
    """Return images as uint8; those in [-1, 1] are clipped and rounded to the nearest level.

    Raises:
        UserError: NaN or infinite values.
    """
    if images.dtype == torch.uint8:
        return images
    if not torch.isfinite(images).all():
        raise UserError("images: NaN or infinite values")
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
