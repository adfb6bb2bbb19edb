"""Proxy distances: named as such, zero for equal sets, growing with damage, equal for any batch size."""

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError
from cat_fast.evaluation.proxy import as_bytes, proxy_features, proxy_fid, proxy_kid


@pytest.fixture(scope="module")
def images():
    found = [resize_center_crop(load_image(p.path), 64) for p in photographs("held_out")[:12]]
    return torch.stack(list(map(image_to_tensor, found)))


def test_distances_grow_with_damage(images):
    slight, heavy = (gaussian_blur(images, [9, 9], [sigma]) for sigma in (0.6, 2.5))
    values = {}
    for label, damaged in (("none", images), ("slight", slight), ("heavy", heavy)):
        name, values[label] = proxy_fid([images], [damaged])
        assert name == "proxy-FID-vgg16"
    variance = proxy_features([images]).var(0).sum().item()
    assert abs(values["none"]) <= 1e-6 * variance < values["slight"] < values["heavy"]
    name, kid = proxy_kid([images], [heavy])
    assert name == "proxy-KID-vgg16"
    assert kid.low < kid.value < kid.high


def test_batch_size_changes_rounding_only(images):
    whole, single = proxy_features([images]), proxy_features(images.split(1))
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-5)


def test_images_are_rounded_to_the_nearest_level():
    levels = torch.arange(256) / 127.5 - 1
    assert torch.equal(as_bytes(levels), torch.arange(256, dtype=torch.uint8))
    assert as_bytes(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    with pytest.raises(UserError, match="NaN"):
        as_bytes(torch.tensor([torch.nan]))
    with pytest.raises(UserError, match="no images"):
        proxy_features([])
