"""The image student: features, the packaged model, its file, and what it was shown to be better than."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cat_fast.complexity.distillation.images.image_data import published_trunk
from cat_fast.complexity.image_scorers.student import low_level, trunk
from cat_fast.complexity.image_scorers.student.scorer import STUDENT_FILE, ImageStudent, image_student
from cat_fast.data.images.io import load_image
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError
from cat_fast.tokenizer.perceptual import STLPIPS


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [load_image(photo.path) for photo in photographs()[:6]]


def test_the_trunk_is_the_published_network(photos: list[Image.Image]) -> None:
    """Compare with an implementation of its own, except at the border, where the blur reflects."""
    published = STLPIPS.pretrained()
    pixels = np.asarray(photos[0].resize((trunk.SIDE, trunk.SIDE)))
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    normalized = (x - published.shift) / published.scale
    maps = published.net(normalized)[:3]
    weights = published_trunk().tensors
    first = F.conv2d(normalized, weights["conv1.weight"], weights["conv1.bias"], 2, 4).relu()
    assert first.shape == maps[0].shape
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(first[inner], maps[0][inner], atol=0.05, rtol=0.01)  # float16 weights
    rows = [m[0].flatten(1) for m in maps]
    expected = torch.cat([s for r in rows for s in (r.mean(1), r.std(1), r.amax(1))]).sqrt().numpy()
    found = published_trunk().features(pixels)
    assert found.shape == expected.shape
    assert np.corrcoef(found, expected)[0, 1] > 0.999


def test_packaged_weights_are_those_of_the_dependency() -> None:
    packaged = image_student().trunk.weights
    for name, weight in published_trunk().weights.items():
        np.testing.assert_array_equal(packaged[name], weight)


def test_low_level_features_follow_detail_and_colour() -> None:
    side = low_level.SIDE
    flat = low_level.low_level_features(Image.new("RGB", (side, side), "teal"))
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    busy = low_level.low_level_features(Image.fromarray(noise))
    assert flat.shape == busy.shape == (low_level.COUNT,)
    assert np.isfinite(flat).all()
    sizes = slice(0, 12)
    assert (busy[sizes] > flat[sizes]).all()
    assert busy[12 + 9] > 0.5 > flat[12 + 9]  # logarithm of the entropy of the colours


def test_scores_depend_on_the_image_alone(photos: list[Image.Image]) -> None:
    student = image_student()
    prepared = [student.prepare(photo) for photo in photos]
    together = student.score_images(prepared)
    assert [student.score_images([image])[0] for image in reversed(prepared)] == together[::-1]
    assert all(1 <= found.score.expected <= 9 and 0 < found.score.confidence < 1 for found in together)
    assert len({found.score.expected for found in together}) > 1
    flat = Image.new("RGB", (64, 48), "navy")
    (found,) = student.score_images([student.prepare(flat)])
    assert found.score.expected < np.mean([f.score.expected for f in together])
    assert found.description is None


def test_contributions_are_effects_of_groups_of_features_on_the_score(photos: list[Image.Image]) -> None:
    student = image_student()
    assert sorted(i for group in low_level.GROUPS.values() for i in group) == [*range(low_level.COUNT)]
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    busy, plain = (
        dict(student.explain(student.prepare(image))[1])
        for image in (Image.fromarray(noise), Image.new("RGB", (64, 48), "navy"))
    )
    assert busy.keys() == plain.keys() == {"textures and parts", *low_level.GROUPS}
    assert plain["textures and parts"] < -0.05
    score, effects = student.explain(student.prepare(photos[0]))
    (scored,) = student.score_images([student.prepare(photos[0])])
    assert scored.score == score
    magnitudes = [abs(effect) for _, effect in effects]
    assert magnitudes == sorted(magnitudes, reverse=True)
    assert 0.05 < magnitudes[0] < 8


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_narrow_images_are_scored(size: tuple[int, int]) -> None:
    student = image_student()
    assert student.score_images([student.prepare(Image.new("RGB", size))])


def test_a_saved_student_is_the_same(tmp_path: Path, photos: list[Image.Image]) -> None:
    student = image_student()
    student.save(tmp_path / "s.npz")
    loaded = ImageStudent.load(tmp_path / "s.npz")
    assert loaded.version == student.version
    image = student.prepare(photos[0])
    assert loaded.score_images([image]) == student.score_images([image])


def test_other_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing; create it"):
        ImageStudent.load(tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes(STUDENT_FILE.read_bytes()[:5000])
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("cut.npz", "other.npz"):
        with pytest.raises(UserError, match="not a file of the image student"):
            ImageStudent.load(tmp_path / name)


def test_the_packaged_student_is_above_jpeg_size_and_small() -> None:
    report = json.loads(STUDENT_FILE.with_suffix(".json").read_text())
    assert report["version"] == image_student().version
    assert report["file_bytes"] == STUDENT_FILE.stat().st_size <= 4_000_000
    assert report["speed"]["images_per_second_on_two_cores"] >= 50
    row = report["trials"][report["head"]]
    assert report["passes"]
    for measure in ("agreement", "spearman"):
        assert row[measure]["value"] > report["trials"]["JPEG bytes"][measure]["value"]
        assert row["over_jpeg"][measure]["low"] > 0
    assert report["training_images"]["rated"]["images"] == 712
    assert all(row["licence"] for row in report["training_images"].values())
