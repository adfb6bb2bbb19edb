"""Distillation of images: heads equal their saved form, trials find what there is, examples and targets."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cat_fast.complexity import Description, Score
from cat_fast.complexity.distillation.images.examples import captioned_images, licences, rated_photographs
from cat_fast.complexity.distillation.images.heads import PENALTIES, KernelHead, Term
from cat_fast.complexity.distillation.images.image_data import ImageData
from cat_fast.complexity.distillation.images.small_cnn import predict_by_cnn
from cat_fast.complexity.distillation.images.student_fit import best_candidate, fit_student
from cat_fast.complexity.distillation.images.trials import (
    CANDIDATES,
    JPEG,
    apply_cuts,
    fit_cuts,
    passes,
    run_trials,
    table,
)
from cat_fast.complexity.distillation.quality import ratios_of
from cat_fast.complexity.image_scorers.student.features import Features
from cat_fast.complexity.image_scorers.student.trunk import Trunk
from cat_fast.errors import UserError


def data(rated: int = 150, extra: int = 30) -> ImageData:
    """Return images whose target is linear in a feature and smooth in another; JPEG sizes are noise."""
    random = np.random.default_rng(0)
    count = rated + extra
    features = Features(
        random.normal(size=(count, 40)).astype(np.float32), random.normal(size=(count, 5)).astype(np.float32)
    )
    targets = 5 + 1.2 * features.trunk[:, 0] + np.cos(2 * features.low[:, 1])
    return ImageData(
        features,
        random.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8),
        random.integers(10_000, 90_000, count),
        np.clip(targets, 1, 9).astype(np.float64),
        np.arange(count) < rated,
        np.array(["rated"] * rated + ["stamps"] * extra),
    )


@pytest.mark.parametrize("extra_weight", [0.0, 0.1])
def test_the_saved_regression_predicts_as_the_head(extra_weight: float) -> None:
    images = data()
    head = KernelHead([Term("trunk", "linear"), Term("low", "rbf", 0.7)], extra_weight)
    rows = head.rows(images, np.arange(180))
    assert len(rows) == (180 if extra_weight else 150)
    asked = np.arange(20)
    for number in (0, 3):
        expected = head.predict(images, rows, asked)[number]
        found = head.fit(images, PENALTIES[number]).predict(images.take(asked).features)
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_an_image_of_little_weight_changes_little() -> None:
    images = data()
    images.targets[150:] = 9.0
    terms = [Term("trunk", "linear"), Term("low", "rbf")]
    asked, rows = np.arange(20), np.arange(20, 180)
    without, little, much = (
        KernelHead(terms, weight).predict(images, rows[: 130 if weight == 0 else None], asked)[2]
        for weight in (0.0, 1e-6, 1.0)
    )
    # Standardization includes all rows, so the results differ slightly.
    assert np.abs(little - without).mean() < 0.1 < np.abs(much - without).mean()


def test_trials_find_the_signal_and_jpeg_noise_does_not() -> None:
    images = data()
    trials = run_trials(images, cnn=False)
    means = images.targets[:150]
    rows = table(trials, means)
    chosen = best_candidate(rows)
    assert chosen in CANDIDATES
    assert passes(rows[chosen])
    assert rows[chosen]["spearman"]["value"] > 0.6
    assert abs(rows[JPEG]["spearman"]["value"]) < 0.3
    reference = ratios_of(means)
    for trial in trials.values():
        for ratio in (8, 16, 32):
            assert abs((trial.ratios == ratio).mean() - (reference == ratio).mean()) < 0.12
    student = fit_student(images, random_trunk(), chosen, trials[chosen])
    expected = student.calibration.expected(trials[chosen].predictions)
    integers = np.floor(expected + 0.5)
    assert (integers <= 4).mean() == pytest.approx((means <= 4).mean(), abs=0.01)
    assert (integers > 7).mean() == pytest.approx((means > 7).mean(), abs=0.01)


def random_trunk() -> Trunk:
    shapes = {
        "conv1": (64, 3, 13, 13),
        "conv2": (192, 64, 5, 5),
        "conv3": (384, 192, 3, 3),
    }
    weights = {f"{name}.weight": np.zeros(shape, np.float16) for name, shape in shapes.items()}
    return Trunk(weights | {f"{name}.bias": np.zeros(shape[0], np.float16) for name, shape in shapes.items()})


def test_cuts_keep_the_mix_also_without_a_ratio() -> None:
    values = np.arange(10.0)
    for reference in ([32] * 5 + [16] * 4 + [8], [16] * 10, [32] * 10, [8] * 10):
        cuts = fit_cuts(values, np.array(reference))
        assert sorted(apply_cuts(values, cuts)) == sorted(reference)


def test_the_small_network_learns() -> None:
    random = np.random.default_rng(0)
    brightness = random.integers(0, 256, 96)
    images = data(96, 0)
    images.pixels[:] = brightness[:, None, None, None]
    images.targets[:] = 1 + brightness / 32
    fitted, asked = np.arange(80), np.arange(80, 96)
    found = predict_by_cnn(images, fitted, asked)
    assert np.corrcoef(found, images.targets[asked])[0, 1] > 0.9


class Teacher:
    name, version = "teacher", "1"

    def score_many(self, descriptions):
        return [Score.of_expected(min(float(len(d.caption.split())), 9.0)) for d in descriptions]


def test_captioned_images_take_the_teachers_scores(tmp_path: Path) -> None:
    rows = [
        {"path": f"{i}.png", "caption": "word " * (i % 3 + 1), "category": f"{'ab'[i % 2]}/x"}
        for i in range(12)
    ]
    rows += [{"path": "0.png", "caption": "repeated"}, {"path": "none.png"}]
    index = tmp_path / "index.jsonl"
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = captioned_images(str(index), Teacher(), 4)
    assert [example.source for example in found] == ["a"] * 4 + ["b"] * 4
    assert all(example.target in (1, 2, 3) for example in found)
    assert len(captioned_images("photographs", Teacher(), 1)) == 56  # the packaged ones are all used
    (tmp_path / "corpus.json").write_text('{"licences": {"a": "CC0"}}')
    assert licences([str(index)])["a"] == "CC0"
    index.write_text('{"path": "a.png"}\n')
    with pytest.raises(UserError, match="contains no captions"):
        captioned_images(str(index), Teacher(), 4)


def test_missing_rated_photographs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="712 of 712 rated photographs are missing, such as n"):
        rated_photographs(tmp_path)


def test_descriptions_are_the_teachers_input(tmp_path: Path) -> None:
    seen: list[Description] = []

    class Recording(Teacher):
        def score_many(self, descriptions):
            seen.extend(descriptions)
            return super().score_many(descriptions)

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    index = tmp_path / "i.jsonl"
    index.write_text('{"path": "a.png", "caption": "a page", "has_text": true}\n')
    captioned_images(str(index), Recording(), 1)
    assert seen == [Description("a page", True, None)]
