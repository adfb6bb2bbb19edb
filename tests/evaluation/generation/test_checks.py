"""The pitfalls that users of FID met, each refused or recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.evaluation.features.inception import InceptionV3
from cat_fast.evaluation.features.loading import LoadedNetwork
from cat_fast.evaluation.generation import checks
from cat_fast.evaluation.generation.reference import open_reference, stored_gaussian
from cat_fast.evaluation.generation.settings import ROUNDINGS, GenerationSettings
from cat_fast.evaluation.images.sets import CROPS, Crop, open_images
from cat_fast.evaluation.provenance import split_of
from cat_fast.evaluation.proxy import as_bytes

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def inception(checksum="6726825d" + "0" * 56):
    with torch.device("meta"):
        network = InceptionV3()
    return LoadedNetwork(network=network, name="inception", file="f", checksum=checksum, is_published=True)


def save(path, **arrays):
    np.savez(path, **arrays)
    return open_reference(path)


def statistics(size=2048, names=("mu", "sigma"), dtype=np.float64):
    return {names[0]: np.zeros(size, dtype), names[1]: np.eye(size, dtype=dtype)}


@pytest.fixture
def samples(tmp_path):
    np.savez(tmp_path / "samples.npz", PIXELS)
    return open_images(tmp_path / "samples.npz")


def test_1_reconstructions_as_samples(samples):
    (samples.path.parent / checks.RECONSTRUCTION_MARK).write_text("{}")
    with pytest.raises(UserError, match="rFID compares them with their originals"):
        checks.check_samples(samples)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("imagenet/train", "train"),
        ("data/train2017/val2017", "validation"),
        ("imagenet_val_512.npz", "validation"),
        ("photos", "unknown"),
        ("held_out", "validation"),
        ("corpus/held_out.jsonl", "validation"),
        ("trains", "unknown"),
    ],
)
def test_2_split_is_recorded(path, split, tmp_path):
    assert split_of(tmp_path / path) == split or split == "unknown"


def test_2_the_folder_of_devices_is_not_a_split():
    assert split_of(Path("/dev/shm/photos")) == "unknown"
    assert split_of(Path("/dev/shm/val/photos")) == "validation"


def test_3_reference_of_another_size_or_crop(samples, tmp_path):
    with pytest.raises(UserError, match=r"its images have 16 x 16 px, the samples 8 x 8 px"):
        checks.check_sizes(samples, save(tmp_path / "r.npz", arr_0=PIXELS.repeat(2, 1).repeat(2, 2)))
    record = {"images": {"height": 8, "width": 8, "crop": CROPS["adm"]}, "network": {}}
    reference = save(tmp_path / "r.npz", **statistics(3), record=np.array(json.dumps(record)))
    checks.check_sizes(samples, reference)  # npz samples: their crop is unknown

    class Cropped:
        size = (8, 8)

        def record(self):
            return {"crop": CROPS["center"]}

    with pytest.raises(UserError, match="cropped otherwise"):
        checks.check_sizes(Cropped(), reference)
    with pytest.raises(UserError, match="leave --crop out"):
        open_reference(tmp_path / "r.npz", Crop(8))


def test_4_images_of_a_reference_file_as_statistics(tmp_path):
    reference = save(tmp_path / "r.npz", arr_0=PIXELS)
    with pytest.raises(UserError, match="Its 6 images are a part of the reference"):
        checks.check_statistics_source(reference, GenerationSettings(metrics=("fid",)))
    with pytest.raises(UserError, match="Its 6 images are a part of the reference"):
        checks.check_statistics_source(reference, GenerationSettings(metrics=("fd-dinov2",)))
    checks.check_statistics_source(reference, GenerationSettings(metrics=("pr", "kid")))
    allowed = GenerationSettings(metrics=("fid",), images_as_statistics=True)
    checks.check_statistics_source(reference, allowed)
    assert any("part of the reference" in line for line in checks.deviations(50_000, (), {}, allowed, None))


def test_4_missing_spatial_statistics(tmp_path):
    reference = save(tmp_path / "r.npz", arr_0=PIXELS, **statistics())
    with pytest.raises(UserError, match=r"mu_s and sigma_s are missing.*--metrics fid"):
        checks.check_statistics_source(reference, GenerationSettings(metrics=("fid", "sfid")))
    with pytest.raises(UserError, match="sigma is missing next to mu"):
        save(tmp_path / "r.npz", mu=np.zeros(3))


def test_5_spatial_statistics_of_another_layer(tmp_path):
    reference = save(tmp_path / "r.npz", **statistics(), **statistics(768, ("mu_s", "sigma_s")))
    with pytest.raises(UserError, match=r"mu_s and sigma_s have 768 features, inception has 2023"):
        stored_gaussian(reference, inception(), "spatial")
    assert stored_gaussian(reference, inception(), "pool").mean.dtype == torch.float64


def test_5_statistics_of_other_weights(tmp_path):
    record = {"images": {}, "network": {"network": "inception", "sha256": "a" * 64}}
    reference = save(tmp_path / "r.npz", **statistics(), record=np.array(json.dumps(record)))
    with pytest.raises(UserError, match=r"SHA-256 aaaaaaaa\.\.\., the weights here have 6726825d"):
        stored_gaussian(reference, inception(), "pool")


def test_6_rounding_is_recorded_and_ours_is_to_the_nearest():
    x = torch.linspace(-1, 1, 10_001)
    nearest = ((x + 1) / 2 * 255).round().to(torch.uint8)
    adm = (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
    truncated = ((x + 1) / 2 * 255).to(torch.uint8)
    assert torch.equal(as_bytes(x), nearest)
    assert (adm != truncated).float().mean() > 0.4, "half a level apart"
    assert (adm != nearest).float().mean() < 0.01
    assert set(ROUNDINGS) == {"nearest", "adm", "truncate", "unknown"}
    with pytest.raises(UserError, match="--rounding round"):
        GenerationSettings(rounding="round")


def test_7_too_few_images():
    with pytest.raises(UserError, match="2048 images for 2048 features"):
        checks.check_count("samples", 2048, 2048, GenerationSettings())
    checks.check_count("samples", 2049, 2048, GenerationSettings())
    checks.check_count("samples", 6, 2048, GenerationSettings(allow_few=True))


def test_8_statistics_in_half_the_digits_are_recorded(tmp_path):
    reference = save(tmp_path / "r.npz", **statistics(dtype=np.float32))
    found = checks.deviations(50_000, (), reference.record(), GenerationSettings(metrics=("fid",)), None)
    assert found == ["reference statistics stored in float32"]


def test_9_latent_statistics_are_missing(tmp_path):
    with pytest.raises(UserError, match=r"lacks scaling_factor, the statistics of its latents"):
        checks.check_scale_recorded(tmp_path, {"shift_factor": 0.0})
    checks.check_scale_recorded(tmp_path, {"shift_factor": 0.0, "scaling_factor": [1.0]})


def test_deviations_from_the_published_protocol():
    assert checks.deviations(50_000, ("png",), {}, GenerationSettings(), 10_000) == []
    settings = GenerationSettings(pr_network="vgg16", k=5)
    found = checks.deviations(5_000, ("jpg", "png"), {}, settings, 3_000)
    assert len(found) == 5
    assert "lossy compression (jpg)" in found[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("fvd",)}, "--metrics fvd: expected fid"),
        ({"metrics": ("is",), "proxy": True}, "not available with --features proxy"),
        ({"weights": {"clip": "x"}}, "--weights clip="),
        ({"pr_network": "dinov2"}, "--pr-features dinov2"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        GenerationSettings(**options)


def test_unusable_references_are_refused(tmp_path):
    for arrays, message in (
        ({"labels": np.arange(3)}, "got labels"),
        ({"mu": np.zeros((2, 2)), "sigma": np.eye(2)}, r"mu: expected 1 dimension"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"sigma has shape \(2, 2\), expected \(3, 3\)"),
    ):
        with pytest.raises(UserError, match=message):
            save(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError, match="expected a reference"):
        open_reference(tmp_path / "r.txt")
