"""A classifier of emoji, trained on augmented renderings, that judges samples of the generator."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 48
"""Side of its images in pixels."""
CLASSES = 240
STEPS, BATCH, LR = 900, 96, 2e-3
_HELD_OUT_SEED = 10_000


class EmojiClassifier(nn.Module):
    """Images (B, 3, SIDE, SIDE) in [-1, 1] -> logits (B, classes)."""

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = [3, width, 2 * width, 4 * width, 8 * width]
        for before, after in itertools.pairwise(sizes):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1] * 9, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


@dataclass(frozen=True)
class Trained:
    """A trained classifier, the captions of its classes, and its accuracy on held-out augmentations."""

    model: EmojiClassifier
    captions: list[str]
    top1: float

    @torch.no_grad()
    def top(self, images: Tensor, count: int = 5) -> list[list[str]]:
        """Return the captions of the most probable classes of each image, (B, 3, H, W) in [-1, 1]."""
        logits = self.model(_resize(images))
        found = logits.topk(min(count, len(self.captions))).indices
        return [[self.captions[i] for i in row] for row in found.tolist()]


def train_classifier(images: Tensor, captions: Sequence[str], steps: int = STEPS, seed: int = 0) -> Trained:
    """Train on augmented renderings; measure the accuracy on other augmentations of the same renderings.

    Args:
        images: one rendering per class, (N, 3, H, W) in [-1, 1] on white.
    """
    torch.manual_seed(seed)
    small = _resize(images)
    model = EmojiClassifier(len(captions))
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    source = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        classes = torch.randint(len(captions), (BATCH,), generator=source)
        loss = F.cross_entropy(model(augment(small[classes], source)), classes, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    source = torch.Generator().manual_seed(_HELD_OUT_SEED + seed)
    with torch.no_grad():
        found = [model(augment(part, source)).argmax(1) for part in small.repeat(4, 1, 1, 1).split(BATCH)]
    expected = torch.arange(len(captions)).repeat(4)
    return Trained(model, list(captions), float((torch.cat(found) == expected).float().mean()))


def augment(images: Tensor, source: torch.Generator) -> Tensor:
    """Move, scale, turn, blur and recolour images (B, 3, S, S) in [-1, 1], and add noise, at random."""
    count = len(images)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=source)

    angle, scale = draw(-0.2, 0.2), draw(0.85, 1.2)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos() / scale, -angle.sin() / scale
    matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin() / scale, angle.cos() / scale
    matrix[:, :, 2] = draw(-0.12, 0.12, 2)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - images, grid, align_corners=False)  # white around the image
    blurred = F.interpolate(
        F.interpolate(moved, scale_factor=1 / 3, mode="area"), size=images.shape[-1], mode="bilinear"
    )
    mixed = torch.lerp(moved, blurred, draw(0, 1, 1, 1, 1))
    colour = draw(0.85, 1.15, 3, 1, 1) * (mixed + 1) - 1 + draw(-0.1, 0.1, 1, 1, 1)
    noise = torch.randn(images.shape, generator=source) * draw(0, 0.15, 1, 1, 1)
    return (colour + noise).clamp(-1, 1)


def _resize(images: Tensor) -> Tensor:
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
