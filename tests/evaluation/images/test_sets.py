"""Image sets: ADM's array files, folders with odd images, crops, and features that resume."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cat_fast.errors import UserError
from cat_fast.evaluation.features.loading import LoadedNetwork
from cat_fast.evaluation.features.network import FeatureNetwork
from cat_fast.evaluation.generation import reference
from cat_fast.evaluation.images import feature_files, npz
from cat_fast.evaluation.images.feature_files import FeatureFiles
from cat_fast.evaluation.images.sets import Crop, open_images, square


def pixels(count, side=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


class MeanColour(FeatureNetwork):
    """Network whose features are known: mean levels; a white image gives NaN."""

    name, resize = "mean", "none"

    def __init__(self):
        super().__init__()
        self.sizes = {"pool": 3}
        self.calls = 0

    def _features(self, images):
        self.calls += 1
        mean = images.float().mean((2, 3))
        return {"pool": mean.where(mean < 255, torch.nan)}


def network(checksum="0" * 64):
    return LoadedNetwork(network=MeanColour(), name="proxy", file="f", checksum=checksum, is_published=False)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_a_file_are_read_one_by_one(tmp_path, save):
    images = pixels(5)
    save(tmp_path / "s.npz", images, np.arange(5))
    found = open_images(tmp_path / "s.npz")
    assert (found.count, found.size) == (5, (16, 16))
    read = [image.pixels.permute(1, 2, 0).numpy() for image in found.read(2, 4)]
    np.testing.assert_array_equal(read, images[2:4])
    picked = [image.pixels.permute(1, 2, 0).numpy() for image in found.pick([0, 1, 4])]
    np.testing.assert_array_equal(picked, images[[0, 1, 4]])
    assert [*found.pick([])] == [*found.read(5, 9)] == []


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pixels(2)}, "got the arrays images"),
        ({"arr_0": pixels(2).transpose(0, 3, 1, 2)}, "channels come last"),
        ({"arr_0": pixels(2).astype(np.float32) / 255}, "uint8"),
        ({"arr_0": pixels(2)[..., 0]}, r"got shape \(2, 16, 16\)"),
        ({"arr_0": pixels(0)}, "no images"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / "s.npz")


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "s.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(UserError, match="not a valid"):
        open_images(tmp_path / "s.npz")
    with pytest.raises(UserError, match="no such file"):
        npz.image_shape(tmp_path / "missing.npz")
    with pytest.raises(UserError, match="expected a folder"):
        open_images(tmp_path / "missing")
    np.savez(tmp_path / "p.npz", arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="pickled"):
        open_images(tmp_path / "p.npz")


def test_grey_alpha_and_16_bit_images_are_8_bit_rgb(tmp_path):
    grey = np.full((8, 8), 128, np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    alpha = np.zeros((8, 8, 4), np.uint8)
    Image.fromarray(alpha).save(tmp_path / "b.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "c.png")
    found = [image.pixels for image in open_images(tmp_path).read(0, 3)]
    assert [image.shape for image in found] == [(3, 8, 8)] * 3
    assert [image.unique().tolist() for image in found] == [[128], [255], [128]]


def test_mixed_sizes_and_unreadable_images_are_named(tmp_path):
    for number, side in enumerate((8, 9, 8)):
        Image.fromarray(pixels(1, side)[0]).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"")
    errors = {image.name: image.error for image in open_images(tmp_path).read(0, 4) if image.pixels is None}
    assert set(errors) == {"1.png", "3.png"}
    assert "9 x 9 px, but the first image has 8 x 8" in errors["1.png"]
    assert "empty" in errors["3.png"]
    cropped = [image.pixels for image in open_images(tmp_path, Crop(8)).read(0, 3)]
    assert all(image.shape == (3, 8, 8) for image in cropped)


def test_the_crop_of_adm():
    """Against the code of ADM's center_crop_arr, as published."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 71, 3), dtype=np.uint8))
    expected = image
    while min(*expected.size) >= 2 * 16:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.Resampling.BOX)
    scale = 16 / min(*expected.size)
    expected = expected.resize(tuple(round(x * scale) for x in expected.size), Image.Resampling.BICUBIC)
    array = np.array(expected)
    y, x = ((length - 16) // 2 for length in array.shape[:2])
    np.testing.assert_array_equal(np.array(square(image, Crop(16, "adm"))), array[y : y + 16, x : x + 16])
    assert not np.array_equal(np.array(square(image, Crop(16))), array[y : y + 16, x : x + 16])


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "PER_FILE", 4)
    found = pixels(10)
    found[3] = 255
    np.savez(tmp_path / "s.npz", found)
    return open_images(tmp_path / "s.npz"), torch.from_numpy(found).float().mean((1, 2))


def test_features_resume_and_leave_out_what_is_not_finite(images, tmp_path):
    source, expected = images
    first = FeatureFiles(tmp_path / "f", source, network())
    first.extract(3, "cpu")
    (tmp_path / "f" / "000001.npz").unlink()
    again = FeatureFiles(tmp_path / "f", source, loaded := network())
    assert again.missing() == [1]
    again.extract(2, "cpu")
    assert loaded.network.calls == 2, "only the missing file"
    kept = [number for number in range(10) if number != 3]
    torch.testing.assert_close(again.load("pool"), expected[kept])
    torch.testing.assert_close(torch.cat(list(again.blocks("pool"))), expected[kept])
    assert [entry.name for entry in again.skipped()] == ["image 3"]


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: data.replace(b"NUMPY", b"MUNPY")])
def test_damaged_features_are_named(images, tmp_path, damage):
    source, _ = images
    found = FeatureFiles(tmp_path / "f", source, network())
    found.extract(8, "cpu")
    path = tmp_path / "f" / "000001.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"000001\.npz is damaged .*; delete it and run again"):
        found.load("pool")


def test_machines_share_the_files_whenever_they_start(images, tmp_path):
    source, _ = images
    for rank in range(2):
        found = FeatureFiles(tmp_path / "f", source, network())
        assert bool(found.missing()) is True
        found.extract(8, "cpu", rank, 2)
    assert found.missing() == []


def test_other_images_or_weights_in_one_folder_are_refused(images, tmp_path):
    source, _ = images
    FeatureFiles(tmp_path / "f", source, network())
    with pytest.raises(UserError, match="other settings"):
        FeatureFiles(tmp_path / "f", source, network("1" * 64))
    np.savez(tmp_path / "s.npz", pixels(10, seed=1))
    with pytest.raises(UserError, match="other settings"):
        FeatureFiles(tmp_path / "f", open_images(tmp_path / "s.npz"), network())
    settings = json.loads((tmp_path / "f" / "settings.json").read_text())
    assert settings["count"] == 10


def test_a_written_reference_has_images_of_the_complete_set(images, tmp_path, monkeypatch):
    """The first images of a folder sorted by class would be those of its first classes."""
    source, _ = images
    monkeypatch.setattr(reference, "MAX_IMAGES", 4)
    found = FeatureFiles(tmp_path / "f", source, network())
    found.extract(8, "cpu")
    reference.write_reference(tmp_path / "r.npz", found)
    numbers = reference.draw_numbers(10, 4).tolist()
    assert numbers == sorted(set(numbers))
    assert numbers != [0, 1, 2, 3]
    with np.load(tmp_path / "r.npz") as written, np.load(tmp_path / "s.npz") as given:
        np.testing.assert_array_equal(written["arr_0"], given["arr_0"][numbers])
    assert reference.draw_numbers(3, 4).tolist() == [0, 1, 2]
