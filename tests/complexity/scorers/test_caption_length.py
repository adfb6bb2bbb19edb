"""Caption length as a score."""

import numpy as np
import pytest

from cat_fast.complexity import Description
from cat_fast.complexity.distillation.quality import spearman
from cat_fast.complexity.rated_captions import read_rated
from cat_fast.complexity.scorers.caption_length import CaptionLength
from cat_fast.errors import UserError


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_longer_captions_score_higher_with_the_distribution_of_ratings(unit: str) -> None:
    scorer = CaptionLength(unit)
    texts = ["cat", *(" ".join(["word"] * n) for n in range(2, 60)), "x" * 100_000, "\ud800 \U0001f600"]
    scores = [result.expected for result in scorer.score_many([Description(text) for text in texts])]
    assert scores[:-2] == sorted(scores[:-2])
    assert scores[0] <= 2
    rated = read_rated()
    expected = np.array([s.expected for s in scorer.score_many([row.description for row in rated])])
    means = np.array([row.mean for row in rated])
    # Equal distributions; less exact where many captions have the same number of words.
    assert np.quantile(expected, [0.1, 0.5, 0.9]) == pytest.approx(
        np.quantile(means, [0.1, 0.5, 0.9]), abs=0.75
    )
    assert 0 < spearman(expected, means) < 0.6


def test_the_version_depends_on_the_unit_and_flags_have_no_effect() -> None:
    words, characters = CaptionLength("words"), CaptionLength("characters")
    assert words.version != characters.version
    assert words.name == "caption-length:words"
    assert words.score_many([Description("a red car", True, True)]) == words.score_many(
        [Description("a red car")]
    )
    with pytest.raises(UserError, match="words or characters, got 'letters'"):
        CaptionLength("letters")  # type: ignore[arg-type]
