"""A small convolutional network trained from scratch, for comparison with frozen features."""

import numpy as np
import torch
from torch import nn

from cat_fast.complexity.distillation.images.image_data import ImageData

_WIDTHS = (16, 32, 64, 64)
_EPOCHS, _BATCH, _RATE, _DECAY = 24, 32, 2e-3, 0.05


def predict_by_cnn(data: ImageData, fitted: np.ndarray, asked: np.ndarray, seed: int = 0) -> np.ndarray:
    """Train on some images; return the predictions for others, (M,).

    Images are mirrored at random. The epochs are fixed, so that no image chooses them.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
    steps = _EPOCHS * -(-len(fitted) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    mean = float(data.targets[fitted].mean())
    network.train()
    for _ in range(_EPOCHS):
        order = random.permutation(fitted)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            x = _pixels(data, rows)
            flipped = torch.from_numpy(random.random(len(rows)) < 0.5)
            x[flipped] = x[flipped].flip(3)
            targets = torch.from_numpy(data.targets[rows] - mean).float()
            loss = (network(x).flatten() - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        return network(_pixels(data, asked)).flatten().double().numpy() + mean


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width in _WIDTHS:
        layers += [
            nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels, 1)
    )


def _pixels(data: ImageData, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(data.pixels[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
