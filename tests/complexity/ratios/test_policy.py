"""Ratio policies: labels in order of precedence, captions scored in one batch, JPEG size as fallback."""

import pytest
import torch
from PIL import Image

from cat_fast.complexity import (
    Description,
    JpegThresholds,
    RatioThresholds,
    Score,
    choose_ratio,
    default_scorer,
    default_thresholds,
    jpeg_ratio,
    scored_by,
)
from cat_fast.complexity.ratios.policy import RatioPolicy
from cat_fast.data.ratio_origin import RatioOrigin, ScoredBy
from cat_fast.data.streams.formats.base import Labels
from cat_fast.errors import UserError

DOG = Labels(caption="a dog lying on grass")
PAIR = RatioThresholds(2, 5)
PACKAGED = scored_by(default_scorer(), default_thresholds())


class Recorder:
    """Scorer that counts words, records its batches, and rejects the caption "refused"."""

    name, version = "recorder", "1"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def score_many(self, descriptions):
        captions = [d.caption for d in descriptions]
        self.batches.append(captions)
        if "refused" in captions:
            raise UserError("refused has no score")
        return [Score.of_expected(len(caption.split())) for caption in captions]


@pytest.mark.parametrize(
    ("order", "labels", "ratio", "source"),
    [
        (("ratio", "score", "caption"), Labels(ratio=8, score=3, caption="a b"), 8, "ratio"),
        (("ratio", "score", "caption"), Labels(score=3, caption="a b"), 16, "score"),
        (("ratio", "score", "caption"), Labels(caption="a b"), 32, "caption"),
        (("score", "caption", "ratio"), Labels(ratio=8, score=3, caption="a b"), 16, "score"),
        (("score", "caption", "ratio"), Labels(ratio=8, caption="a b"), 32, "caption"),
        (("score", "caption", "ratio"), Labels(ratio=8), 8, "ratio"),
        (("caption",), Labels(ratio=8, score=9, caption="a b c"), 16, "caption"),
    ],
)
def test_first_label_in_order_decides(order, labels, ratio, source):
    policy = RatioPolicy(order, PAIR, Recorder())
    (choice,) = policy.choose([labels])
    assert (choice.ratio, choice.source) == (ratio, source)
    assert policy.ratio_from_labels(labels) == ratio


def test_choices_hold_the_origin_of_the_ratio():
    stored = ScoredBy("other", "7", (3, 4))
    images = [
        Labels(ratio=8, scored_by=stored),
        Labels(score=3, scored_by=stored),
        Labels(score=3),
        Labels(caption="a b", scored_by=stored),
    ]
    for scorer, own in ((Recorder(), ScoredBy("recorder", "1", (2, 5))), (None, PACKAGED)):
        policy = RatioPolicy(("ratio", "score", "caption"), PAIR, scorer)
        assert [choice.origin for choice in policy.choose(images)] == [
            RatioOrigin(source="ratio", scored_by=stored),
            RatioOrigin(source="score", scored_by=stored, thresholds=(2, 5)),
            RatioOrigin(source="score", thresholds=(2, 5)),
            RatioOrigin(source="caption", scored_by=own, thresholds=(2, 5)),
        ]
    policy = RatioPolicy((), jpeg=JpegThresholds(1, 2))
    choice = policy.choose_by_pixels(Image.new("RGB", (8, 8)))
    assert (choice.ratio, choice.origin) == (8, RatioOrigin(source="jpeg size", jpeg_thresholds=(1, 2)))
    assert RatioPolicy((), fixed=8).choose(images)[0].origin == RatioOrigin(source="fixed")


def test_real_thresholds_apply_to_the_expected_score_of_captions_and_labels():
    """A score without its expected value is an error: rounded scores would miss the budget."""
    policy = RatioPolicy(("score", "caption"), RatioThresholds(4.3, 7.5), Recorder())
    images = [
        Labels(score=4, expected=4.25),
        Labels(score=4, expected=4.4),
        Labels(score=4),
        Labels(caption="a b"),
    ]
    below, above, unknown, caption = policy.choose(images)
    assert [below.ratio, above.ratio, caption.ratio] == [32, 16, 32]
    assert above.origin == RatioOrigin(source="score", thresholds=(4.3, 7.5))
    assert caption.origin.scored_by == ScoredBy("recorder", "1", (4.3, 7.5))
    assert isinstance(unknown, UserError)
    assert 'store it as "expected"' in str(unknown)


def test_images_without_a_label_get_no_choice():
    policy = RatioPolicy(("ratio", "score"))
    assert policy.choose([DOG]) == [None]
    assert policy.ratio_from_labels(DOG) is None


def test_fixed_ratio_ignores_labels():
    policy = RatioPolicy(("caption",), scorer=Recorder(), fixed=16)
    assert {(c.ratio, c.source, c.score) for c in policy.choose([DOG, Labels(), Labels(score=99)])} == {
        (16, "fixed", None)
    }
    assert policy.scorer.batches == []


def test_scoring_in_one_batch_equals_scoring_one_by_one():
    images = [DOG, Labels(score=4), Labels(), Labels(caption="a b c d e f", has_faces=True), Labels(ratio=8)]
    policy = RatioPolicy(("ratio", "score", "caption"), PAIR, Recorder())
    together = policy.choose(images)
    assert policy.scorer.batches == [["a dog lying on grass", "a b c d e f"]]
    assert together == [choice for image in images for choice in policy.choose([image])]


def test_packaged_scorer_and_thresholds_are_the_default():
    (choice,) = RatioPolicy(("caption",)).choose([Labels(caption=DOG.caption, has_faces=True)])
    expected = choose_ratio(Description(DOG.caption, has_faces=True))
    assert (choice.ratio, choice.score, choice.why) == (expected.ratio, expected.score, DOG.caption)


def test_invalid_labels_do_not_affect_other_images():
    images = [DOG, Labels(caption="refused"), Labels(score=12), Labels(caption=" "), Labels(caption="a b")]
    policy = RatioPolicy(("score", "caption"), PAIR, Recorder())
    first, refused, out_of_range, blank, last = policy.choose(images)
    assert (first.ratio, last.ratio) == (16, 32)
    for error, words in ((refused, "refused has no score"), (out_of_range, "12"), (blank, "non-empty")):
        assert isinstance(error, UserError)
        assert words in str(error)
    assert [policy.ratio_from_labels(image) for image in images] == [16, None, None, None, 32]


def test_choose_by_pixels():
    noise = torch.randint(
        0, 256, (3, 512, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for ratio, pixels in {32: torch.full_like(noise, 90), 8: noise}.items():
        assert jpeg_ratio(pixels) == ratio
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        choice = RatioPolicy(("caption",)).choose_by_pixels(image)
        assert (choice.ratio, choice.score, choice.source) == (ratio, None, "jpeg size")
