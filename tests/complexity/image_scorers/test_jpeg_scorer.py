"""JPEG size on the scale of the scores: the published thresholds choose the same ratios."""

import itertools

import pytest
from PIL import Image

from cat_fast.complexity import JPEG_THRESHOLDS, JpegThresholds, RatioThresholds, jpeg_bytes
from cat_fast.complexity.image_scorers.jpeg import JpegScorer
from cat_fast.data.images.io import image_to_bytes, resize_center_crop


@pytest.mark.parametrize("pair", [(38761, 65837), (10, 10), (0, 5), (200_000, 300_000)])
def test_scores_have_the_ratios_of_the_sizes(pair: tuple[int, int]) -> None:
    thresholds = JpegThresholds(*pair)
    scorer = JpegScorer(thresholds)
    near = [value + step for value in (0, *pair, 118_428, 10**6) for step in (-1, 0, 1)]
    sizes = sorted({size for size in near if size >= 1})
    scores = [scorer.score_bytes(size) for size in sizes]
    for ratio_of in (RatioThresholds(4, 7), RatioThresholds(4.0, 7.0)):
        assert [ratio_of.ratio_of(score) for score in scores] == [thresholds.ratio(size) for size in sizes]
    expected = [score.expected for score in scores]
    assert all(a <= b for a, b in itertools.pairwise(expected))
    assert 1 <= expected[0] <= expected[-1] == 9


def test_an_image_is_measured_at_512_px() -> None:
    image = Image.effect_noise((300, 200), 80).convert("RGB")
    scorer = JpegScorer()
    (found,) = scorer.score_images([scorer.prepare(image)])
    size = jpeg_bytes(image_to_bytes(resize_center_crop(image, 512)))
    assert found.score == scorer.score_bytes(size)
    assert found.description is None
    assert scorer.version != JpegScorer(JpegThresholds(1, 2)).version
    assert scorer.version == JpegScorer(JPEG_THRESHOLDS).version
