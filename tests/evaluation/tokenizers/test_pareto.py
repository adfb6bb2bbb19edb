"""Sweeps over rules against a second evaluation of each rule, and dominated points by hand."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from cat_fast.complexity import RatioThresholds
from cat_fast.errors import UserError
from cat_fast.evaluation.tokenizers.columns import KnownScore
from cat_fast.evaluation.tokenizers.pareto import Point, mark_dominated, merge_equal, plot, sweep

SCORES = [1, 3, 5, 7, 9, 9]
TOKENS = {8: 64.0, 16: 16.0, 32: 4.0}
PSNR = {8: 30.0, 16: 25.0, 32: 20.0}


@pytest.fixture
def evaluation(tmp_path):
    """Images whose PSNR at a ratio falls with their score, and a baseline of one rate."""
    columns = {
        f"ours {ratio}x": {"tokenizer": "ours", "rule": str(ratio), "tokens": tokens, "flops": 10.0 * tokens}
        for ratio, tokens in TOKENS.items()
    }
    columns["ours adaptive"] = {"tokenizer": "ours", "rule": "adaptive", "tokens": 1.0, "flops": 1.0}
    columns["other 64 tokens"] = {"tokenizer": "other", "rule": "64", "tokens": 64.0, "flops": None}
    rows = [
        {
            "key": str(n), "column": name, "score": score, "expected": score + 0.1,
            "psnr": PSNR.get(ratio, 10.0) - score, "ssim": 0.5, "st_lpips_alex": 0.01 * ratio + 0.1 * score,
        }
        for n, score in enumerate(SCORES)
        for ratio, name in ((8, "ours 8x"), (16, "ours 16x"), (32, "ours 32x"), (64, "other 64 tokens"))
    ]  # fmt: skip
    path = tmp_path / "images.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return {"columns": columns, "data": {"size": 128}}, path


def test_every_rule_has_its_means(evaluation):
    points = {(p.tokenizer, p.kind, p.rule): p for p in sweep(*evaluation)}
    assert len([p for p in points.values() if p.kind == "thresholds"]) == 36
    assert points["ours", "fixed", "16x"].metrics["PSNR"] == pytest.approx(25 - np.mean(SCORES))
    chosen = [RatioThresholds(4, 7).ratio_of(KnownScore(score, None)) for score in SCORES]
    point = points["ours", "thresholds", "(4, 7)"]
    assert point.tokens == pytest.approx(np.mean([TOKENS[f] for f in chosen]))
    assert point.flops == pytest.approx(10 * point.tokens)
    expected = np.mean([PSNR[f] - score for f, score in zip(chosen, SCORES, strict=True)])
    assert point.metrics["PSNR"] == pytest.approx(expected)
    for point in points.values():
        if point.kind == "budget":
            assert point.tokens <= float(point.rule.split()[0]) + 1e-6


def test_dominated_points(evaluation):
    points = {(p.tokenizer, p.rule): p for p in sweep(*evaluation)}
    assert points["other", "64 tokens"].dominated["PSNR"], "ours at 8x has as many tokens and 20 dB more"
    assert not points["ours", "8x"].dominated["PSNR"]
    assert not points["ours", "32x"].dominated["PSNR"]


def point(tokens, flops, psnr):
    facts = {"tokenizer": "t", "kind": "fixed", "rule": "r", "dominated": {}}
    return Point(tokens=tokens, flops=flops, metrics={"PSNR": psnr}, **facts)


def test_domination_needs_all_of_tokens_flops_and_metric():
    points = [point(10, 5, 30), point(10, 6, 30), point(20, 4, 30), point(10, 5, 30), point(10, None, 29)]
    assert [p.dominated["PSNR"] for p in mark_dominated(points)] == [False, True, False, False, True]


def test_equal_points_are_merged():
    points = [point(20, 4, 30), point(10, 5, 30), point(20, 4, 30), point(20, None, 30)]
    assert merge_equal(points, "PSNR") == [(points[1], 1), (points[0], 2), (points[3], 1)]


def test_the_plot_is_an_image(evaluation, tmp_path):
    plot(sweep(*evaluation), tmp_path / "p.png", "title")
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 800


def test_an_evaluation_without_fixed_ratios_is_refused(evaluation):
    result, path = evaluation
    adaptive = {"ours adaptive": result["columns"]["ours adaptive"]}
    with pytest.raises(UserError, match="no columns of a fixed ratio"):
        sweep({**result, "columns": adaptive}, path)
    with pytest.raises(UserError, match="cannot be read"):
        sweep(result, path.with_name("missing.parquet"))
