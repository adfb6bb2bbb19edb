"""The default thresholds are the published pair; there is one source of it, which everything follows."""

import json

from typer.testing import CliRunner

from cat_fast.cli.main import app
from cat_fast.complexity import (
    Description,
    RatioThresholds,
    choose_ratio,
    default_thresholds,
)
from cat_fast.complexity.ratios import thresholds
from cat_fast.complexity.ratios.image_ratios import index_photographs
from cat_fast.complexity.ratios.policy import RatioPolicy
from cat_fast.config import fill
from cat_fast.data.photographs import photographs
from cat_fast.demo.metrics import _complexity
from cat_fast.inference.encoding.shard_plan import EncodeShardsSettings
from cat_fast.training.config.settings import ImageDataConfig

PAIR = RatioThresholds(1, 2)


def test_the_default_is_the_published_pair():
    assert default_thresholds() == RatioThresholds(4, 7)
    assert fill(ImageDataConfig, {}, []).thresholds == [4, 7]


def test_everything_follows_the_default(monkeypatch, tmp_path):
    monkeypatch.setattr(thresholds, "PUBLISHED", PAIR)
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
