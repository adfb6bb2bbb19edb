"""Reconstruction errors as signals: units, and any callable as the model."""

import pytest
import torch

from cat_fast.complexity.signals.reconstruction_error import reconstruction_errors
from cat_fast.tokenizer.perceptual import STLPIPS


def test_errors_are_of_pixels_in_0_1_and_of_the_clamped_reconstruction() -> None:
    images = torch.stack([torch.full((3, 32, 32), value) for value in (-1.0, 0.0, 1.0)])
    found = reconstruction_errors(images, lambda x: x + 0.5, lambda x, y: (x - y).abs().amax((1, 2, 3)))
    # The last image cannot get brighter. A difference of 0.5 in [-1, 1] is one of 0.25 in [0, 1].
    assert found.mse.tolist() == pytest.approx([0.0625, 0.0625, 0.0])
    assert found.distance.tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_detail_that_a_blur_loses_is_an_error() -> None:
    smooth = torch.linspace(-1, 1, 64).expand(3, 64, 64)
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = torch.stack([smooth, noise])

    def blur(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(x, 4), scale_factor=4)

    found = reconstruction_errors(images, blur, STLPIPS.pretrained())
    assert found.mse[1] > 10 * found.mse[0]
    assert found.distance[1] > found.distance[0]
    assert not found.mse.requires_grad
