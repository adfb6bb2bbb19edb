"""Image metrics against their formulas in float64."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.transforms.functional import gaussian_blur

from cat_fast.evaluation.metrics import mean_colour_psnr, psnr, ssim


def images(count: int = 3, height: int = 20, width: int = 28) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def psnr64(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    return [
        10 * math.log10(2.0**2 / (a - b).square().mean()) for a, b in zip(x.double(), y.double(), strict=True)
    ]


def test_psnr_is_the_formula_per_image():
    x = images()
    y = torch.stack([gaussian_blur(p, [5, 5], [s]) for p, s in zip(x, (0.4, 0.9, 2.0), strict=True)])
    assert psnr(x, y).shape == (3,)
    assert psnr(x, y).tolist() == pytest.approx(psnr64(x, y), abs=1e-4)
    assert psnr(y, x).tolist() == psnr(x, y).tolist()


def test_a_known_error_has_its_known_value():
    x = torch.zeros(1, 3, 8, 8)
    # An error of a tenth of the range is 20 dB, of a hundredth 40 dB.
    assert psnr(x, x + 0.2).item() == pytest.approx(20, abs=1e-4)
    assert psnr(x, x + 0.02).item() == pytest.approx(40, abs=1e-4)


def test_values_out_of_range_are_clamped():
    x = images()
    assert torch.equal(psnr(x, 3 * x), psnr(x, (3 * x).clamp(-1, 1)))
    white = torch.ones(1, 3, 8, 8)
    assert psnr(white, 5 * white).item() == pytest.approx(100)


def test_equal_images_have_a_finite_value():
    assert psnr(images(), images()).tolist() == pytest.approx([100.0] * 3)


def test_the_mean_colour_is_the_best_single_colour():
    x = images()
    mean = torch.stack([p.double().mean((1, 2)) for p in x])[:, :, None, None]
    assert mean_colour_psnr(x).tolist() == pytest.approx(psnr64(x, mean.expand_as(x)), abs=1e-4)
    for shift in (-0.05, 0.05):
        other = (mean + shift).float().expand_as(x)
        assert (psnr(x, other) < mean_colour_psnr(x)).all()


def test_an_image_of_one_colour_is_its_own_mean():
    colour = torch.tensor([0.3, -0.7, 0.1])[None, :, None, None].expand(1, 3, 16, 16)
    assert mean_colour_psnr(colour).item() == pytest.approx(100, abs=1)


def test_psnr_and_ssim_equal_scikit_image():
    x = images()
    y = torch.stack([gaussian_blur(p, [5, 5], [s]) for p, s in zip(x, (0.4, 0.9, 2.0), strict=True)])
    for number, (a, b) in enumerate(zip(x.double().numpy(), y.double().numpy(), strict=True)):
        expected = structural_similarity(
            a, b, data_range=2, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(x, y)[number].item() == pytest.approx(expected, rel=1e-6)
        assert psnr(x, y)[number].item() == pytest.approx(
            peak_signal_noise_ratio(a, b, data_range=2), rel=1e-5
        )


def test_ssim_of_equal_and_of_flat_images():
    assert ssim(images(), images()).tolist() == pytest.approx([1.0] * 3)
    flat = torch.full((1, 3, 16, 16), 0.25)
    assert ssim(flat, flat).item() == pytest.approx(1)
