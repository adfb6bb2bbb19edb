"""Fits of distilled scorers: adapters, calibration, and the protocol of the measurement out of fold."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from cat_fast.complexity import Description, Score
from cat_fast.complexity.distillation import accurate_fit
from cat_fast.complexity.distillation.accurate_fit import EncodedCaptions, fit_accurate
from cat_fast.complexity.distillation.adapter_training import TrainingPlan
from cat_fast.complexity.distillation.study import predict_out_of_fold, report
from cat_fast.complexity.rated_captions import RatedCaption, read_rated
from cat_fast.complexity.scorers.accurate.calibration import Calibration, RawPredictions
from cat_fast.complexity.scorers.accurate.rating_model import RatingModel
from cat_fast.complexity.scorers.fast.scorer import fast_scorer
from cat_fast.complexity.sentence_encoder import SentenceEncoder


@pytest.fixture(scope="module")
def encoded():
    rated = [row for row in read_rated() if len(row.description.caption) < 60][::60]
    return EncodedCaptions.compute(SentenceEncoder.load(), rated)


def test_adapted_layers_start_as_the_encoder_and_merge_without_change(encoded, monkeypatch):
    torch.manual_seed(0)
    for module in encoded.encoder.layers.modules():  # layers that are trained use torch's products
        if hasattr(module, "backend"):
            monkeypatch.setattr(module, "backend", "mkl")
    model = RatingModel(encoded.encoder).eval()
    states, real = encoded.hidden.batch([0, 5, 9])
    adapted = states
    for layer, frozen in zip(model.layers, encoded.encoder.layers[3:], strict=True):
        adapted, states = layer(adapted, real), frozen(states, real)
    assert torch.equal(adapted[real], states[real])

    for name, value in model.adapter().items():
        if name.endswith(".up"):
            value.normal_(0, 0.01)
    before = model.predict(*encoded.hidden.batch([0, 5, 9]))
    after = model.merge().predict(*encoded.hidden.batch([0, 5, 9]))
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(before, after, strict=True))
    for name, value in SentenceEncoder.load().layers.state_dict().items():
        assert torch.equal(encoded.encoder.layers.state_dict()[name], value), name


def test_a_fit_is_reproducible_and_resumes_from_finished_adapters(encoded, tmp_path, monkeypatch):
    encoded = replace(encoded, pooled=encoded.pooled[:, ::24])  # a quick projection
    plan, rows = TrainingPlan(epochs=1), np.arange(len(encoded.rated))
    steps: list[int] = []
    scorers = [
        fit_accurate(
            encoded, rows, fast_scorer(), plan=plan, folder=tmp_path / name, on_step=lambda: steps.append(1)
        )
        for name in ("a", "b")
    ]
    assert scorers[0].version == scorers[1].version
    assert len(steps) == 2 * accurate_fit.training_steps(encoded, rows, plan)
    monkeypatch.setattr(accurate_fit, "train_adapter", lambda *_, **__: pytest.fail("trained again"))
    assert (
        fit_accurate(encoded, rows, fast_scorer(), plan=plan, folder=tmp_path / "a").version
        == scorers[0].version
    )


def test_calibration_moves_only_predictions_near_the_boundaries_and_keeps_the_order():
    rng = np.random.default_rng(0)
    means = rng.integers(2, 19, 3000) / 2
    kernel = 5 + 0.85 * (means - 5) + rng.normal(0, 0.5, 3000)
    ratings = np.exp(-((np.arange(1, 10) - kernel[:, None]) ** 2))
    raw = RawPredictions(ratings / ratings.sum(1, keepdims=True), kernel, kernel)
    calibration = Calibration.fit(raw, means)
    expected = calibration.expected(raw)
    assert (np.diff(expected[np.argsort(raw.expected)]) >= 0).all()
    for threshold, boundary in ((4, 4.5), (7, 7.5)):
        assert (expected < boundary).mean() == pytest.approx((means <= threshold).mean(), abs=0.002)
    far = (
        np.abs(raw.expected[:, None] - [calibration.boundaries.low, calibration.boundaries.high]).min(1) > 0.8
    )
    assert expected[far] == pytest.approx(raw.expected[far])
    right = np.abs(np.floor(expected + 0.5) - means) <= 0.5
    assert calibration.confidences(raw).mean() == pytest.approx(right.mean(), abs=0.01)


@dataclass
class _Memory:
    """A scorer that knows the captions of its fit, and fails the test if it meets one of them."""

    seen: set[str]
    name: str = "memory"
    version: str = "1"

    def score_many(self, descriptions):
        assert not self.seen & {d.caption.lower() for d in descriptions if d.has_text is not None}
        even = [int(re.findall(r"\d+", d.caption)[0]) % 2 == 0 for d in descriptions]
        return [
            Score.of_expected((4.6 if d.has_text is not None else 5.6) + e, 0.5)
            for e, d in zip(even, descriptions, strict=True)
        ]


def test_every_caption_with_two_ratings_is_scored_once_without_its_group(tmp_path):
    rated = [
        RatedCaption(
            Description(f"caption {i}", False, False),
            (4,) if i % 3 == 0 else (4, 5) if i % 2 else (5, 6),
            "x",
            image=f"{i // 2}",
        )
        for i in range(60)
    ]
    rated.append(replace(rated[1], description=Description("CAPTION 7", False, False)))
    fits: list[int] = []

    def fit(rows):
        fits.append(len(rows))
        return _Memory({rated[i].description.caption.lower() for i in rows})

    found = predict_out_of_fold(rated, fit, tmp_path, settings="1")
    assert sorted(found.rows) == [i for i, row in enumerate(rated) if len(row.ratings) > 1]
    assert found.expected[1] == pytest.approx(found.expected[0] + 1)
    assert len(fits) == 5
    predict_out_of_fold(rated, fit, tmp_path, settings="1")
    assert len(fits) == 5  # read from the folder
    predict_out_of_fold(rated, fit, tmp_path, settings="2")
    assert len(fits) == 10
    figures = report(rated, found)
    assert figures["all"]["given"]["mae"]["value"] == pytest.approx(0.1)
    assert figures["sources"]["x"]["inferred"]["mix"] == {"8x": 0, "16x": 1, "32x": 0}
    assert figures["paraphrases"]["synonyms"]["mean_change"] == 0
