"""The packaged rated captions, their folds, and quality figures against other implementations."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import spearmanr

from cat_fast.complexity import Description, Score, round_score
from cat_fast.complexity.distillation.quality import measure_quality, reliability
from cat_fast.complexity.rated_captions import RatedCaption, assign_folds, read_rated
from cat_fast.errors import UserError


@pytest.fixture(scope="module")
def rated():
    return read_rated()


def test_packaged_captions_have_the_documented_sources_and_mixes(rated):
    assert Counter(row.source for row in rated) == {
        "coco": 1691,
        "coco_single_rating": 8000,
        "parti": 1394,
        "written": 1071,
        "imagenet_style": 1000,
        "imagenet_sample": 712,
    }
    coco = np.array([row.mean for row in rated if row.source == "coco"])
    assert measure_quality(coco, coco).mix == pytest.approx({8: 0.04, 16: 0.59, 32: 0.37}, abs=0.01)


def test_a_fold_shares_neither_images_nor_texts_with_another(rated):
    folds = assign_folds(rated)
    for key in (lambda r: r.description.caption.lower(), lambda r: r.image or id(r)):
        seen: dict = {}
        for row, fold in zip(rated, folds, strict=True):
            assert seen.setdefault(key(row), fold) == fold
    for source in {row.source for row in rated}:
        counts = np.bincount([f for f, row in zip(folds, rated, strict=True) if row.source == source])
        assert len(counts) == 5
        assert counts.max() - counts.min() <= 0.05 * counts.sum()


def test_captions_that_are_linked_through_a_third_share_a_fold():
    def row(text, image):
        return RatedCaption(Description(text), (5,), "x", image=image)

    chain = [row("a", "1"), row("A", "2"), row("b", "2")]
    others = [row(f"t{i}", f"i{i}") for i in range(40)]
    assert len(set(assign_folds([*chain, *others])[:3])) == 1
    assert set(assign_folds(others)) == set(range(5))


def test_quality_counts_half_points_of_raters_as_they_are():
    quality = measure_quality(np.array([4.4, 4.5, 7.5, 7.4]), np.array([4.5, 4.5, 7.5, 7.0]))
    assert quality.agreement.value == 0.75  # 4.4 rounds to 4, which gets 32x; a mean of 4.5 gets 16x
    assert quality.reference_mix == {8: 0.25, 16: 0.75, 32: 0.0}
    assert quality.mae.value == pytest.approx(0.125)


def test_rank_correlation_and_interval_against_scipy():
    rng = np.random.default_rng(0)
    means = rng.integers(2, 19, 400) / 2
    expected = np.clip(means + rng.normal(0, 1, 400), 1, 9)
    quality = measure_quality(expected, means)
    assert quality.spearman.value == pytest.approx(spearmanr(expected, means).statistic)
    assert quality.spearman.low < quality.spearman.value < quality.spearman.high
    half_width = 1.96 * np.abs(expected - means).std() / 20
    assert quality.mae.high - quality.mae.value == pytest.approx(half_width, rel=0.2)


def test_reliability_of_a_calibrated_and_an_overconfident_scorer():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 0.9, 20_000)
    right = rng.uniform(size=20_000) < confidence
    score, means = np.full(20_000, 5), np.where(right, 5.5, 6.0)
    assert reliability(confidence, score, means)[1] < 0.02
    assert reliability(np.minimum(confidence + 0.1, 1), score, means)[1] == pytest.approx(0.1, abs=0.02)


def test_score_rounds_half_points_up_and_rejects_impossible_values():
    assert [round_score(x) for x in (1.0, 4.49, 4.5, 8.5, 9.0)] == [1, 4, 5, 9, 9]
    assert Score.of_expected(6.5) == Score(7, 6.5)
    for bad in ({"score": 0}, {"expected": 9.5}, {"expected": float("nan")}, {"confidence": 1.5}):
        with pytest.raises(UserError):
            Score(**({"score": 5, "expected": 5.0} | bad))


@pytest.mark.parametrize("scores", ["[]", "[0]", "[5.5]", "7", '["7"]', "[true]"])
def test_ratings_that_are_not_integers_from_1_to_9_are_refused(tmp_path, scores):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"caption": "a", "scores": {scores}}}\n')
    with pytest.raises(UserError, match="line 1"):
        read_rated([path])
