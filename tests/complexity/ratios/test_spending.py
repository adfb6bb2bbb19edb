"""Notice of other thresholds and mixed scorers, with the mean tokens."""

import pytest

from cat_fast.complexity import default_scorer, default_thresholds, scored_by
from cat_fast.complexity.ratios.spending import spending_notice
from cat_fast.data.ratio_origin import RatioOrigin, ScoredBy

OWN = scored_by(default_scorer(), default_thresholds())
PAIR = OWN.thresholds
OTHER = ScoredBy("other", "1", (2, 6))
MIX = {8: 1, 16: 2, 32: 1}
TOKENS = (
    "mean 400.0 tokens per image at 512 px, against 256 at a fixed 16x (+56.2%)"  # (1024 + 2 * 256 + 64) / 4
)


def origin(source, by=None, thresholds=None):
    return RatioOrigin(source=source, scored_by=by, thresholds=thresholds)


@pytest.mark.parametrize(
    "origins",
    [
        {},
        {origin("score", OWN, PAIR): 9},
        {origin("score", None, PAIR): 9},
        {origin("score", OTHER, (2, 6)): 9},
        {origin("caption", OWN, PAIR): 9, origin("ratio", OWN): 5, origin("score", OWN, PAIR): 1},
        {origin("ratio"): 9, origin("fixed"): 1, origin("score", OWN, PAIR): 1},
        {RatioOrigin(source="jpeg size", jpeg_thresholds=(1, 2)): 9, origin("score", OTHER, (2, 6)): 9},
    ],
)
def test_scores_of_one_scorer_with_its_thresholds_need_no_notice(origins):
    assert spending_notice(origins, MIX, 512) is None


@pytest.mark.parametrize(
    ("origins", "reason"),
    [
        ({origin("score", OTHER, (4, 7)): 9}, "thresholds 4,7 instead of 2,6, the thresholds of other 1"),
        (
            {origin("score", OTHER, PAIR): 9},
            f"thresholds {PAIR[0]},{PAIR[1]} instead of 2,6, the thresholds of other 1",
        ),
        ({origin("score", None, (0, 9)): 9}, "thresholds 0,9 instead of"),
        ({origin("caption", OWN, (0, 9)): 9}, f"the thresholds of {OWN}"),
        ({origin("ratio", ScoredBy(OWN.scorer, OWN.version, (0, 9))): 9}, "thresholds 0,9 instead of"),
        (
            {origin("score", OWN, PAIR): 1, origin("score", None, PAIR): 3},
            f"scores of 2 scorers are mixed ({OWN} 25%, an unrecorded scorer 75%)",
        ),
        (
            {origin("ratio", OTHER): 1, origin("caption", OWN, PAIR): 1},
            f"scores of 2 scorers are mixed ({OWN} 50%, other 1 50%)",
        ),
        (
            {origin("ratio", OTHER): 1, origin("ratio", ScoredBy("other", "2", (2, 6))): 1},
            "scores of 2 scorers are mixed (other 1 50%, other 2 50%)",
        ),
        (
            {origin("ratio", OTHER): 1, origin("ratio", ScoredBy("other", "1", (3, 6))): 1},
            "ratios by thresholds 2,6 and 3,6 are mixed",
        ),
    ],
)
def test_other_thresholds_and_mixed_scorers_are_named_with_the_mean_tokens(origins, reason):
    for mix in (MIX, {8: 0.25, 16: 0.5, 32: 0.25}):
        notice = spending_notice(origins, mix, 512)
        assert reason in notice
        assert notice.endswith(TOKENS)
        assert "\n" not in notice


def test_any_ratio_and_size_can_be_reported():
    notice = spending_notice({origin("score", OTHER, (4, 7)): 1}, {4: 1}, 100)
    assert "mean 156.2 tokens per image at 100 px" in notice
    notice = spending_notice({origin("score", OTHER, (4, 7)): 1}, {8: 1}, [48, 96])
    assert "mean 18.0 tokens per image at 48 × 96 px" in notice
