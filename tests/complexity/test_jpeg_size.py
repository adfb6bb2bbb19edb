"""JPEG size as a measure of detail: agrees with another encoder, grows with detail, published thresholds."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cat_fast.complexity import JPEG_THRESHOLDS, jpeg_bytes, jpeg_ratio
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
    low, high = JPEG_THRESHOLDS
    for image, size in zip(images, sizes, strict=True):
        assert jpeg_ratio(image) == (32 if size <= low else 16 if size <= high else 8)
    assert {jpeg_ratio(image) for image in images} == {8, 16, 32}


@pytest.mark.parametrize(("size", "ratio"), [(38761, 32), (38762, 16), (65837, 16), (65838, 8)])
def test_sizes_at_the_published_thresholds_get_the_higher_ratio(
    monkeypatch: pytest.MonkeyPatch, size: int, ratio: int
) -> None:
    monkeypatch.setattr("cat_fast.complexity.jpeg_size.jpeg_bytes", lambda image: size)
    assert jpeg_ratio(noise(0)) == ratio


def test_other_sizes_shapes_and_dtypes_are_rejected() -> None:
    with pytest.raises(UserError, match="512 x 512"):
        jpeg_ratio(noise(0, side=256))
    for image in (torch.zeros(3, 512, 512), noise(0)[0], noise(0)[:2]):
        with pytest.raises(UserError, match="uint8 image"):
            jpeg_bytes(image)
