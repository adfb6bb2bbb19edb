"""JPEG size as a measure of detail: agrees with another encoder, grows with detail, fitted thresholds."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cat_fast.complexity import JPEG_THRESHOLDS, JpegThresholds, jpeg_bytes, jpeg_ratio, ratio_mix
from cat_fast.errors import UserError


def noise(strength: int, side: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(128 - strength, 129 + strength, (3, side, side), generator=generator).to(torch.uint8)


def test_size_agrees_with_another_encoder_at_quality_75() -> None:
    image, file = noise(20), io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))).save(file, "JPEG", quality=75)
    assert jpeg_bytes(image) == pytest.approx(file.getbuffer().nbytes, rel=0.02)


def test_more_detail_takes_more_bytes_and_gets_more_tokens() -> None:
    images = [noise(strength) for strength in (0, 8, 20, 100)]
    sizes = [jpeg_bytes(image) for image in images]
    assert sizes == sorted(sizes)
    for image, size in zip(images, sizes, strict=True):
        assert jpeg_ratio(image) == (32 if size <= 38761 else 16 if size <= 65837 else 8)
        assert jpeg_ratio(image, JpegThresholds(size, size)) == 32
        assert jpeg_ratio(image, JpegThresholds(size - 1, size)) == 16
        assert jpeg_ratio(image, JpegThresholds(0, size - 1)) == 8
    assert {jpeg_ratio(image) for image in images} == {8, 16, 32}


@pytest.mark.parametrize(("size", "ratio"), [(38761, 32), (38762, 16), (65837, 16), (65838, 8)])
def test_sizes_at_the_published_thresholds_get_the_higher_ratio(
    monkeypatch: pytest.MonkeyPatch, size: int, ratio: int
) -> None:
    monkeypatch.setattr("cat_fast.complexity.ratios.jpeg_thresholds.jpeg_bytes", lambda image: size)
    assert jpeg_ratio(noise(0)) == ratio


def test_other_sizes_shapes_and_dtypes_are_rejected() -> None:
    with pytest.raises(UserError, match="512 x 512"):
        jpeg_ratio(noise(0, side=256))
    for image in (torch.zeros(3, 512, 512), noise(0)[0], noise(0)[:2]):
        with pytest.raises(UserError, match="uint8 image"):
            jpeg_bytes(image)


@pytest.mark.parametrize("text", ["5", "5,4", "-1,4", "a,b", "1.5,2", "1,2,3", ""])
def test_invalid_thresholds_are_rejected(text: str) -> None:
    with pytest.raises(UserError, match="JPEG thresholds must be"):
        JpegThresholds.parse(text)


def test_thresholds_are_parsed_from_text_and_default_to_the_published_ones() -> None:
    assert JpegThresholds.parse("38761, 65837") == JPEG_THRESHOLDS


@pytest.mark.parametrize("count", [100, 101, 1000, 20_000])
@pytest.mark.parametrize(
    "mix", [{8: 0.1, 16: 0.48, 32: 0.42}, {8: 0.005, 16: 0.895, 32: 0.1}, {8: 1 / 3, 16: 1 / 3, 32: 1 / 3}]
)
def test_fitted_thresholds_give_the_mix_to_the_image(count: int, mix: dict[int, float]) -> None:
    """Sizes are distributed like the published ones."""
    sizes = np.random.default_rng(count).normal(45474, 15037, count).clip(6128, 118428).astype(int)
    fitted = JpegThresholds.fit(sizes.tolist(), mix)
    for ratio, share in ratio_mix(map(fitted.ratio, sizes)).items():
        assert share == pytest.approx(mix[ratio], abs=1.5 / count + 1e-3 * (count >= 1000))


def test_ratios_without_a_share_get_no_image() -> None:
    sizes = range(1000, 1200)
    assert ratio_mix(map(JpegThresholds.fit(sizes, {32: 1.0}).ratio, sizes)) == {8: 0, 16: 0, 32: 1}
    assert ratio_mix(map(JpegThresholds.fit(sizes, {8: 1.0, 32: 0.0}).ratio, sizes)) == {8: 1, 16: 0, 32: 0}
    halves = JpegThresholds.fit(sizes, {8: 0.5, 32: 0.5})
    assert ratio_mix(map(halves.ratio, sizes)) == {8: 0.5, 16: 0, 32: 0.5}


THIRDS = {8: 0.25, 16: 0.25, 32: 0.5}


@pytest.mark.parametrize(
    ("sizes", "mix", "reason"),
    [
        (range(1, 100), THIRDS, "at least 100 images, got 99"),
        ([], THIRDS, "at least 100 images, got 0"),
        (range(1, 201), {8: 0.2, 16: 0.2, 32: 0.5}, "sum to 1"),
        (range(1, 201), {8: 20, 16: 30, 32: 50}, "sum to 1"),
        (range(1, 201), {8: -0.5, 16: 1.0, 32: 0.5}, "sum to 1"),
        (range(1, 201), {8: float("nan"), 16: 0.5, 32: 0.5}, "sum to 1"),
        (range(1, 201), {}, "sum to 1"),
        (range(1, 201), {4: 0.5, 16: 0.5}, "one of 8, 16 and 32, got 4"),
        ([500] * 200, THIRDS, "200 of 200 images have 500 bytes"),
        ([*range(1, 50), 50, 50, *range(51, 100)], THIRDS, "2 of 100 images have 50 bytes"),
        ([*range(1, 91)] + [90] * 10, THIRDS | {8: 0.05, 16: 0.45}, "11 of 100 images have 90 bytes"),
        ([1.5] * 200, THIRDS, "positive integers"),
        ([*range(200)], THIRDS, "positive integers"),
    ],
)
def test_unfittable_sizes_and_mixes_are_refused_in_one_line(sizes, mix, reason) -> None:
    with pytest.raises(UserError, match=reason) as error:
        JpegThresholds.fit(sizes, mix)
    assert "\n" not in str(error.value)


def test_equal_sizes_away_from_the_thresholds_do_not_matter() -> None:
    fitted = JpegThresholds.fit([10] * 50 + [20] * 25 + [30] * 25, {8: 0.25, 16: 0.25, 32: 0.5})
    assert fitted == JpegThresholds(10, 20)
