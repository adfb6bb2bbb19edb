"""Training crops: undistorted windows of the image, reproducible, and text is never flipped."""

import numpy as np
import pytest
import torch
from PIL import Image

from cat_fast.data.images.io import load_image
from cat_fast.data.images.random_crop import shrink
from cat_fast.data.streams.decoding import CropSettings, crop_pixels

# 8-bit rounding, and a bicubic edge that bends the outermost pixel.
ROUNDING = 2 / 255


@pytest.fixture
def ramp(tmp_path):
    """Return a function that writes an image whose red encodes x and whose green encodes y."""

    def write(width: int, height: int, name: str = "ramp.png") -> str:
        right = np.tile(np.linspace(0, 255, width), (height, 1))
        down = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
        pixels = np.stack([right, down, np.full_like(right, 64)], axis=-1)
        Image.fromarray(pixels.round().astype(np.uint8)).save(tmp_path / name)
        return str(tmp_path / name)

    return write


def cropper(path, image_size=32, min_crop=0.25, allow_flip=False, colour_jitter=0.0):
    """Return a function from a random generator to a crop, (3, H, W) in [-1, 1]."""
    image, settings = load_image(path), CropSettings(image_size, min_crop, colour_jitter)

    def crop(rng: np.random.Generator) -> torch.Tensor:
        pixels = torch.from_numpy(crop_pixels(image, rng, allow_flip, settings))
        assert pixels.dtype == (torch.float32 if colour_jitter else torch.uint8)
        return pixels if colour_jitter else pixels.float() / 127.5 - 1

    return crop


def rngs(count: int):
    return [np.random.default_rng(seed) for seed in range(count)]


def span(channel: torch.Tensor, along: int) -> float:
    """Return the share of the image that a ramp's crop covers along one side: slope times pixels."""
    profile = channel.double().mean(1 - along)
    inner = profile[4:-4]
    slope = (inner[-1] - inner[0]) / (len(inner) - 1)
    return float(slope * len(profile) / 2)


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (80, 80), (20, 30), (33, 32)])
def test_every_crop_is_a_square_of_the_requested_size_within_range(ramp, width, height):
    crop_of = cropper(ramp(width, height))
    for rng in rngs(20):
        crop = crop_of(rng)
        assert crop.shape == (3, 32, 32)
        assert -1 <= crop.min() <= crop.max() <= 1


def test_a_crop_is_an_undistorted_window_of_the_image(ramp):
    crop_of = cropper(ramp(400, 200), min_crop=0.25)
    sides = []
    for rng in rngs(60):
        red, green, blue = crop_of(rng)
        wide, high = 400 * span(red, along=1), 200 * span(green, along=0)
        assert wide == pytest.approx(high, rel=0.08, abs=2), "both sides have the same scale"
        assert 50 - 3 <= high <= 200 + 3
        sides.append(high)
        # Coordinates increase to the right and downwards: neither flipped nor rotated.
        assert (red[:, 4:] - red[:, :-4]).min() > -ROUNDING
        assert (green[4:] - green[:-4]).min() > -ROUNDING
        assert (blue - (2 * 64 / 255 - 1)).abs().max() < ROUNDING
    assert min(sides) < 80
    assert max(sides) > 170


@pytest.mark.parametrize("size", [(48, 96), (96, 48), [40, 24]])
@pytest.mark.parametrize(("width", "height"), [(400, 200), (150, 300), (60, 50), (97, 97)])
def test_a_non_square_crop_is_an_undistorted_window_within_the_image(ramp, size, width, height):
    crop_of = cropper(ramp(width, height), image_size=size)
    unit = min(width / size[1], height / size[0])  # image pixels per pixel of the largest crop
    units = []
    for rng in rngs(40):
        crop = crop_of(rng)
        assert crop.shape == (3, *size)
        wide, high = width * span(crop[0], along=1), height * span(crop[1], along=0)
        assert wide / size[1] == pytest.approx(high / size[0], rel=0.12)
        units.append(wide / size[1])
    assert min(unit, 1) * 0.9 <= min(units) <= max(units) <= unit * 1.1
    assert unit < 1.5 or max(units) > 1.5 * min(units)


def test_square_crops_are_those_of_a_side(ramp):
    path = ramp(123, 77)
    for rng, same in zip(rngs(10), rngs(10), strict=True):
        assert torch.equal(cropper(path, image_size=32)(rng), cropper(path, image_size=(32, 32))(same))


def test_windows_are_spread_evenly_over_the_image(ramp):
    crop_of = cropper(ramp(200, 200), min_crop=0.2)
    places = []
    for rng in rngs(400):
        crop = crop_of(rng)
        if (side := span(crop[0], along=1)) < 0.6:
            centre = (crop[:2].double().mean((1, 2)) + 1) / 2
            places.append((centre - side / 2) / (1 - side))  # 0 at the left or upper border, 1 at the other
    x, y = torch.stack(places).T
    assert len(places) > 150
    even = (torch.arange(len(places)) + 0.5) / len(places)
    for along in (x, y):
        assert (along.sort().values - even).abs().max() < 0.1
    assert torch.corrcoef(torch.stack([x, y]))[0, 1].abs() < 0.2


def test_a_crop_is_never_enlarged_unless_the_image_is_too_small(ramp):
    large, small = cropper(ramp(100, 100), image_size=80, min_crop=0.1), cropper(ramp(40, 40))
    for rng in rngs(20):
        assert 100 * span(large(rng)[0], along=1) >= 80 * 0.95
    whole = cropper(ramp(20, 20), image_size=32)
    first = whole(np.random.default_rng(0))
    assert all(torch.equal(whole(rng), first) for rng in rngs(5)), "only one window exists"
    assert 40 * span(small(np.random.default_rng(0))[0], along=1) >= 32 * 0.95


def test_crops_are_reproducible_from_the_generator_state(ramp):
    crop_of = cropper(ramp(128, 96), allow_flip=True, colour_jitter=0.4)
    first, again, other = (crop_of(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_half_of_the_crops_are_flipped(ramp):
    crop_of = cropper(ramp(96, 96), allow_flip=True)
    flipped = sum(span(crop_of(rng)[0], along=1) < 0 for rng in rngs(200))
    assert 70 <= flipped <= 130


def test_text_is_never_flipped(ramp):
    crop_of = cropper(ramp(96, 96), allow_flip=False)
    assert all(span(crop_of(rng)[0], along=1) > 0 for rng in rngs(50))


def test_colour_jitter_permutes_scales_and_shifts_whole_channels(ramp):
    jitter, path = 0.3, ramp(64, 64)
    whole = {"image_size": 64, "min_crop": 1.0}
    plain = cropper(path, **whole)(np.random.default_rng(0)).double()
    crop_of = cropper(path, colour_jitter=jitter, **whole)
    orders = set()
    for rng in rngs(30):
        crop = crop_of(rng).double()
        assert -1 <= crop.min() <= crop.max() <= 1
        order = tuple(ramp_of(channel) for channel in crop)
        for channel, number in zip(crop, order, strict=True):
            inside = channel.abs() < 1  # clamped values are not informative
            if number == 2:  # gain and shift of a constant cannot be separated
                assert channel.std() < 1e-6
                continue
            gain, shift = np.polyfit(plain[number][inside], channel[inside], 1)
            torch.testing.assert_close(
                channel[inside], gain * plain[number][inside] + shift, atol=1e-5, rtol=0
            )
            assert 1 - jitter <= gain <= 1
            assert abs(shift) <= jitter
        orders.add(order)
    assert len(orders) == 6, "all channel orders occur"


def ramp_of(channel: torch.Tensor) -> int:
    """Return the original channel of a ramp: 0 varies along rows, 1 along columns, 2 is constant."""
    return 0 if channel.std(1).max() > 0.1 else 1 if channel.std(0).max() > 0.1 else 2


def test_large_images_are_downscaled_and_others_unchanged(ramp):
    assert shrink(load_image(ramp(400, 200)), 100).size == (200, 100)
    small = load_image(ramp(90, 60))
    assert shrink(small, 100) is small


def test_shrinking_is_bicubic():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.asarray(shrink(image, 32)), expected)
