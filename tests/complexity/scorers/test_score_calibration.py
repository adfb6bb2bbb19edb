"""Calibration of a scorer to ratings."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cat_fast.complexity import Description, Score, ScoringFailure
from cat_fast.complexity.rated_captions import RatedCaption
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration
from cat_fast.complexity.scorers.language_model.replies import ModelReply, Token, read_score
from cat_fast.errors import UserError


class Compressed:
    """Scorer whose expected scores are a third as far from 5 as they should be, with noise."""

    name, version = "llm:tiny", "abc"

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        rng = np.random.default_rng(0)
        truth = [float(description.caption) for description in descriptions]
        noise = rng.normal(0, 0.1, len(truth))
        results: list[Score | ScoringFailure] = [
            Score.of_expected(5 + (t - 5) / 3 + n) for t, n in zip(truth, noise, strict=True)
        ]
        results[0] = ScoringFailure("no valid score")
        return results


@pytest.fixture(scope="module")
def calibration() -> ScoreCalibration:
    ratings = np.random.default_rng(1).integers(1, 10, 1001)
    return ScoreCalibration.fit(
        Compressed(), [RatedCaption(Description(str(r)), (int(r),), "x") for r in ratings]
    )


def test_the_fitted_map_is_monotone_and_undoes_the_compression(calibration: ScoreCalibration) -> None:
    mapped = [calibration.apply(x) for x in np.linspace(1, 9, 200)]
    assert mapped == sorted(mapped)
    assert calibration.captions == 1000
    for truth in (2, 3.5, 5, 6.5, 8):
        assert calibration.apply(5 + (truth - 5) / 3) == pytest.approx(truth, abs=0.3)
    assert calibration.deviation == pytest.approx(0.3, abs=0.05)


def test_a_calibrated_reply_is_rounded_after_the_map(calibration: ScoreCalibration) -> None:
    tokens = [Token("Score: ", {"Score: ": 1.0}), Token("6", {"6": 0.7, "5": 0.3})]
    score = read_score(ModelReply("Score: 6 out of 9", tokens), 9, calibration)
    assert score.expected == pytest.approx(5 + 0.7 * 3, abs=0.3)
    assert score.score == 7
    assert score.confidence is not None
    assert 0.75 < score.confidence < 0.95  # 0.1 from the score, with a deviation of 0.3


def test_a_calibration_is_stored_per_scorer_and_version(
    calibration: ScoreCalibration, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.json"
    calibration.save(path)
    assert ScoreCalibration.load(path) == calibration
    calibration.check("llm:tiny", "abc")
    with pytest.raises(UserError, match="fitted for llm:tiny abc, but the scorer is llm:tiny def"):
        calibration.check("llm:tiny", "def")


@pytest.mark.parametrize(
    "change",
    [
        {"expected": [1, 1]},
        {"rating": [5, 4]},
        {"rating": [0, 4]},
        {"rating": [1, 4, 5]},
        {"expected": "no"},
        {"deviation": float("nan")},
        {"extra": 1},
        {"scorer": None, "expected": None},
    ],
)
def test_damaged_files_are_refused_by_name(change: dict, tmp_path: Path) -> None:
    content = {
        "scorer": "s",
        "version": "v",
        "captions": 60,
        "expected": [1, 2],
        "rating": [1, 4],
        "deviation": 0.5,
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps(content | change), encoding="utf-8")
    with pytest.raises(UserError, match=r"c\.json: not a calibration file"):
        ScoreCalibration.load(path)


def test_too_few_captions_are_refused() -> None:
    rated = [RatedCaption(Description("5"), (5,), "x")] * 40
    with pytest.raises(UserError, match="39 captions were scored; a calibration needs at least 50"):
        ScoreCalibration.fit(Compressed(), rated)
