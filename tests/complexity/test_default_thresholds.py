"""There is one source of the default thresholds; everything follows it."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from cat_fast.cli.main import app
from cat_fast.complexity import (
    Description,
    EmbeddedScorer,
    RatioThresholds,
    choose_ratio,
    default_scorer,
    default_thresholds,
    embedded_scorer,
)
from cat_fast.complexity.image_ratios import index_photographs
from cat_fast.complexity.ratio_policy import RatioPolicy
from cat_fast.config import fill
from cat_fast.data.photographs import photographs
from cat_fast.demo.metrics import _complexity
from cat_fast.inference.encoding.shard_plan import EncodeShardsSettings
from cat_fast.training.config.settings import ImageDataConfig

PAIR = RatioThresholds(
    1, 2
)  # gives every score another ratio than the pair of the packaged scorer does, or 32x


@pytest.fixture
def other_default(tmp_path, monkeypatch):
    """Let the report of the packaged scorer hold another pair."""
    report = json.loads(embedded_scorer.REPORT_FILE.read_text()) | {"thresholds": {"a": PAIR.a, "b": PAIR.b}}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    default_thresholds.cache_clear()
    monkeypatch.setattr(embedded_scorer, "REPORT_FILE", path)
    yield
    default_thresholds.cache_clear()


def test_everything_follows_the_pair_of_the_packaged_scorer(other_default, tmp_path):
    assert default_thresholds() == PAIR
    assert fill(ImageDataConfig, {}, []).thresholds == [PAIR.a, PAIR.b]
    assert RatioPolicy(("score",)).thresholds == PAIR
    assert EncodeShardsSettings(source="photographs", out=tmp_path).policy().thresholds == PAIR
    description = Description("a bowl of fruit on a table")
    result = choose_ratio(description)
    assert result.ratio == PAIR.ratio(result.score)
    records = index_photographs(photographs("held_out"))
    assert {r.scored_by.thresholds for r in records} == {(PAIR.a, PAIR.b)}
    assert [r.ratio for r in records] == PAIR.ratios(r.score for r in records)
    assert _complexity(records)["thresholds"] == [PAIR.a, PAIR.b]
    scored = CliRunner().invoke(app, ["score", description.caption, "--json", str(tmp_path / "scores.json")])
    assert "thresholds 1,2" in scored.stdout
    assert json.loads((tmp_path / "scores.json").read_text())["thresholds"] == [PAIR.a, PAIR.b]


def test_version_of_a_scorer_changes_with_its_scores_only(tmp_path):
    scorer = default_scorer()
    scorer.save(tmp_path / "copy.npz")
    assert EmbeddedScorer.load(tmp_path / "copy.npz").version == scorer.version
    idf = replace(scorer.space, word_idf=scorer.space.word_idf * 1.01)
    others = [
        EmbeddedScorer(idf, scorer.coefficients, scorer.intercept, scorer.knots),
        EmbeddedScorer(scorer.space, scorer.coefficients * 1.01, scorer.intercept, scorer.knots),
        EmbeddedScorer(scorer.space, scorer.coefficients, scorer.intercept + 0.01, scorer.knots),
        EmbeddedScorer(scorer.space, scorer.coefficients, scorer.intercept, scorer.knots + 0.01),
    ]
    assert len({scorer.version, *(other.version for other in others)}) == 5
