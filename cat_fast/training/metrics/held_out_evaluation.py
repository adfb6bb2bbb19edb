"""Metrics of held-out images during a run: proxy-FID, proxy-KID, PSNR and a perceptual distance per ratio.

The images are fixed, the weights are the averaged ones, and no random number is drawn: a run with evaluations
is bit-identical to one without. Figures named proxy-... compare steps and runs with each other only.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cat_fast.data.images.io import image_to_bytes, resize_center_crop
from cat_fast.data.images.size import Size
from cat_fast.evaluation.distances.kernel import kernel_distance
from cat_fast.evaluation.features.loading import load_network
from cat_fast.evaluation.metrics import psnr
from cat_fast.evaluation.proxy import as_bytes, fid_of_features
from cat_fast.tokenizer.perceptual import perceptual_distance
from cat_fast.training.metrics.reconstruction_grid import GridImages

SECONDS = "evaluation/seconds"
_MIN_IMAGES = 3
"""Number of images from which distances between sets are defined."""


class HeldOutEvaluation:
    """Evaluates reconstructions of the same images at every ratio.

    Args:
        images: held-out images, or training images if a run has none; their center crops are kept.
        size: size of the crops, in pixels.
        batch_size: images per forward pass.
    """

    def __init__(self, images: GridImages, size: Size, batch_size: int, device: torch.device) -> None:
        crops = [image_to_bytes(resize_center_crop(image, size)) for image in images.images]
        self.originals = torch.stack(crops)
        self.split = "held_out" if images.held_out else "training"
        self.batch_size, self.device = batch_size, device
        self.network = load_network("proxy", device=device).network
        self.perceptual_name, self.perceptual = perceptual_distance("auto")
        self.perceptual.to(device)
        self.features = torch.cat([self._features(batch) for batch in self.originals.split(batch_size)])

    @torch.no_grad()
    def evaluate(
        self, reconstruct: Callable[[Tensor, int], Tensor], ratios: Sequence[int]
    ) -> dict[str, float]:
        """Return the metrics by name, and the seconds they took.

        Args:
            reconstruct: maps images (B, 3, H, W) in [-1, 1] and a ratio to their reconstructions.
        """
        started = time.perf_counter()
        found: dict[str, float] = {}
        for ratio in ratios:
            sums, features = dict.fromkeys(("psnr", self.perceptual_name), 0.0), []
            for batch in self.originals.split(self.batch_size):
                x = batch.to(self.device).float() / 127.5 - 1
                back = reconstruct(x, ratio).float().nan_to_num(0.0)  # so that a diverged model has figures
                saved = as_bytes(back)
                features.append(self._features(saved))
                y = saved.float() / 127.5 - 1
                sums["psnr"] += psnr(y, x).sum().item()
                sums[self.perceptual_name] += self.perceptual(y, x).sum().item()
            for name, total in sums.items():
                found[f"{self.split}/{name}_{ratio}x"] = total / len(self.originals)
            if len(self.originals) >= _MIN_IMAGES:
                theirs = torch.cat(features)
                found[f"{self.split}/proxy-FID-vgg16_{ratio}x"] = fid_of_features(theirs, self.features)
                found[f"{self.split}/proxy-KID-vgg16_{ratio}x"] = kernel_distance(theirs, self.features).value
        return found | {SECONDS: round(time.perf_counter() - started, 4)}

    def _features(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.device))["pool"].cpu()
