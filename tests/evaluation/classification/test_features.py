"""Features of probes: padding, pixels of equal width, untrained encoders, arrays and intervals."""

import errno
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from cat_fast.errors import UserError
from cat_fast.evaluation.classification.arrays import is_complete, read_arrays, writing
from cat_fast.evaluation.classification.features import (
    Choices,
    features_of,
    pixel_features,
    randomly_initialised,
    write_features,
    write_images,
)
from cat_fast.evaluation.classification.sets import open_splits
from cat_fast.evaluation.classification.summary import wilson_interval
from cat_fast.evaluation.tokenizers.columns import parse_columns
from cat_fast.evaluation.tokenizers.protocol import open_tokenizer
from tests.cli.conftest import tiny_tokenizer

SIZE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes; the test split has one image of an unknown class and one damaged image."""
    root = tmp_path_factory.mktemp("data")
    for split, counts in (("train", {"dark": 3, "light": 3}), ("test", {"dark": 2, "light": 2, "new": 1})):
        for category, count in counts.items():
            (root / split / category).mkdir(parents=True)
            for number in range(count):
                level = (40 if category == "dark" else 200) + number
                Image.new("RGB", (20, 20), (level, level, level)).save(
                    root / split / category / f"{number}.png"
                )
    (root / "test" / "dark" / "bad.png").write_bytes(b"damaged")
    return root


@pytest.fixture(scope="module")
def column(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return parse_columns(open_tokenizer(str(folder), "cpu", "ours"), ["16"])[0]


def test_latents_are_flattened_and_padded_at_the_end():
    latents = torch.arange(2 * 3 * 4.0).view(2, 3, 2, 2)
    found = features_of(latents, 48, pooled=False)
    assert found.shape == (2, 48)
    assert torch.equal(found[:, :12], latents.flatten(1))
    assert not found[:, 12:].any()
    assert torch.equal(features_of(latents, 48, pooled=True), latents.mean((2, 3)))


def test_pixels_have_the_width_of_the_latents():
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    found = pixel_features(images, 256)
    assert found.shape == (2, 256)
    side = 9  # 3 x 9 x 9 = 243 of 256
    assert not found[:, 3 * side**2 :].any()
    assert found[:, : side**2].mean() == pytest.approx(images[:, 0].mean().item(), abs=0.05)


def test_an_untrained_encoder_has_the_same_shape_and_other_weights():
    model = tiny_tokenizer(initialisation="pyramid")
    other = randomly_initialised(model, 3)
    assert {k: v.shape for k, v in other.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert not torch.equal(other.encoder.conv_in.weight, model.encoder.conv_in.weight)
    assert torch.equal(other.encoder.conv_in.weight, randomly_initialised(model, 3).encoder.conv_in.weight)


def test_features_are_those_of_the_encoder(data, column, tmp_path):
    train, test = open_splits(str(data))
    assert train.classes() == ["dark", "light"]
    choices = Choices(column, SIZE, None)
    width = 4 * (SIZE // 8) ** 2
    write_features(
        tmp_path / "flat", test, train.classes(), choices, column.tokenizer.encode, width, {"s": 1}, 2,
        tmp_path / "pooled",
    )  # fmt: skip
    arrays, pooled = read_arrays(tmp_path / "flat"), read_arrays(tmp_path / "pooled")
    assert arrays.inputs.shape == (4, width)
    assert pooled.inputs.shape == (4, 4)
    assert arrays.labels.tolist() == [0, 0, 1, 1]
    assert arrays.ratios.tolist() == [16] * 4
    reasons = {entry["name"]: entry["why"] for entry in arrays.record["skipped"]}
    assert len(reasons) == 2
    assert any("class 'new' is not in the training set" in why for why in reasons.values())
    level = torch.full((1, 3, SIZE, SIZE), 40 / 127.5 - 1)
    latent = column.tokenizer.encode(level, 16)
    np.testing.assert_allclose(arrays.inputs[0, : latent.numel()], latent.flatten(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled.inputs[0], latent.mean((2, 3))[0], rtol=1e-4, atol=1e-5)
    assert is_complete(tmp_path / "flat", {"s": 1})
    assert not is_complete(tmp_path / "flat", {"s": 2})


def test_images_for_fine_tuning(data, column, tmp_path):
    train, _ = open_splits(str(data))
    write_images(tmp_path / "i", train, train.classes(), Choices(column, SIZE, None), {})
    arrays = read_arrays(tmp_path / "i")
    assert arrays.inputs.shape == (6, 3, SIZE, SIZE)
    assert arrays.inputs[:, 0, 0, 0].tolist() == [40, 41, 42, 200, 201, 202]


def test_scores_choose_adaptive_ratios(data, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "t")
    column = parse_columns(open_tokenizer(str(tmp_path / "t"), "cpu", "ours"), ["adaptive"])[0]
    train, _ = open_splits(str(data))
    with pytest.raises(UserError, match="no image could be used"):
        write_images(tmp_path / "a", train, train.classes(), Choices(column, SIZE, None), {})
    rows = [{"key": entry.scored.key, "score": 1 + 4 * (entry.category == "light")} for entry in train.read()]
    (tmp_path / "scores.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_images(tmp_path / "a", train, train.classes(), Choices(column, SIZE, tmp_path / "scores.jsonl"), {})
    assert read_arrays(tmp_path / "a").ratios.tolist() == [32] * 3 + [16] * 3


def test_unfinished_arrays_are_not_read(tmp_path):
    context = writing(tmp_path, 2, (3,), np.float32, {})
    context.__enter__().add(np.zeros(3), 0, 8)
    with pytest.raises(UserError, match="no labelled arrays"):
        read_arrays(tmp_path)


def test_a_full_disk_is_one_line_before_any_image_is_read(tmp_path, monkeypatch):
    def full(file, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        writing(tmp_path / "a", 2, (3,), np.float32, {}).__enter__()
    assert not any((tmp_path / "a").iterdir())


def test_splits_are_found_or_named(tmp_path, data):
    with pytest.raises(UserError, match="expected the subfolders train and test"):
        open_splits(str(tmp_path))
    train, test = open_splits(f"{data / 'train'}::{data / 'test'}")
    assert (train.count(), test.count()) == (6, 6)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    flat, _ = open_splits(f"{tmp_path / 'flat'}::{data / 'test'}")
    with pytest.raises(UserError, match=r"no class|two classes"):
        flat.classes()


def test_the_fingerprint_changes_with_any_image(tmp_path):
    for category in ("a", "b"):
        (tmp_path / category).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / category / f"{number}.png")

    def fingerprint():
        return open_splits(f"{tmp_path}::{tmp_path}")[0].fingerprint

    before = fingerprint()
    assert fingerprint() == before
    Image.new("RGB", (9, 9)).save(tmp_path / "b" / "1.png")
    replaced = fingerprint()
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "2.png")
    assert len({before, replaced, fingerprint()}) == 3


def test_the_fingerprint_changes_with_an_archive(tmp_path):
    def fingerprint(shade):
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(tmp_path / "k.png")
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(tmp_path / "k.png", "k.png")
        os.utime(tmp_path / "a.tar", (shade, shade))
        return open_splits(f"{tmp_path / 'a.tar'}::{tmp_path / 'a.tar'}")[0].fingerprint

    assert fingerprint(10) == fingerprint(10) != fingerprint(20)


def test_archives_that_cannot_be_opened_are_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"damaged")
    train, _ = open_splits(f"{tmp_path / 'a.tar'}::{tmp_path / 'a.tar'}")
    with pytest.raises(UserError, match=r"a\.tar cannot be opened"):
        train.classes()


@pytest.mark.parametrize(("right", "count"), [(0, 20), (7, 20), (450, 1500)])
def test_intervals_are_wilsons(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, count) == pytest.approx((expected.low, expected.high), abs=1e-12)
