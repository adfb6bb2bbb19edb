"""The study of complexity: best ratios, correlations, agreement, and a run on the packaged photographs."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import scipy.stats
import torch

from cat_fast.complexity import RatioThresholds
from cat_fast.data.images.io import load_image
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError
from cat_fast.evaluation.complexity_study.best_ratio import best_ratios, share_losing_less
from cat_fast.evaluation.complexity_study.images import open_study_images
from cat_fast.evaluation.complexity_study.measure import measure_all
from cat_fast.evaluation.complexity_study.run import ImageLoader
from cat_fast.evaluation.complexity_study.scores import ScoreSet
from cat_fast.evaluation.complexity_study.statistics import agreement, difference, estimate, pearson, spearman
from cat_fast.evaluation.complexity_study.study import JPEG, collect, disagreements, fitted_ratios, summarize
from tests.cli.conftest import cat_fast, checkpoint, tiny_tokenizer  # noqa: F401 # fixtures

RATIOS = np.array([8, 16, 32])


def test_the_best_ratio_is_the_largest_within_the_tolerance() -> None:
    errors = np.array(
        [
            [0.001, 0.002, 0.009],
            [0.001, 0.0025, 0.0024],  # 16x is worse than 32x
            [0.004, 0.003, 0.0046],  # the best one need not be 8x
            [0.001, 0.001, 0.001],
        ]
    )
    assert best_ratios(errors, RATIOS, 0.0015).tolist() == [16, 32, 16, 32]
    assert best_ratios(errors, RATIOS, 0.0).tolist() == [8, 8, 16, 32]
    assert share_losing_less(errors, 0.001) == 0.5


def test_statistics_are_those_of_scipy_and_intervals_are_paired() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=200)
    y = np.round(x + random.normal(size=200))
    assert float(pearson(x, y)) == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert float(spearman(x, y)) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert float(pearson(np.ones(5), np.arange(5.0))) == 0.0
    found = estimate(pearson, x, y)
    analytic = np.tanh(np.arctanh(found.value) + np.array([-1, 1]) * 1.96 / np.sqrt(197))
    assert [found.low, found.high] == pytest.approx(analytic.tolist(), abs=0.04)
    same = difference(pearson, x, 2 * x + 1, y)
    assert (same.low, same.high) == pytest.approx((0, 0), abs=1e-12)
    assert difference(spearman, x, random.normal(size=200), y).low > 0


def test_fitted_ratios_have_the_mix_and_follow_the_metric() -> None:
    best = np.array([32, 8, 16, 16, 32, 32])
    found = fitted_ratios(np.array([1.0, 6, 5, 4, 2, 3]), best)
    assert found.tolist() == [32, 8, 16, 16, 32, 32]
    assert float(agreement(found, best)) == 1.0
    assert sorted(fitted_ratios(np.arange(6.0), best)) == sorted(best)


def measurement(key: str, complexity: float, size: int) -> dict:
    errors = {"8": 0.001, "16": 0.001 + 0.0004 * complexity, "32": 0.001 + 0.0005 * complexity**2}
    return {
        "key": key,
        "mse": errors,
        "lpips": errors,
        "signal_mse": 0.001 * complexity,
        "signal_lpips": 0.1,
        "jpeg_bytes": size,
        "error": None,
    }


def write_scores(path: Path, scores: dict[str, float], scorer: str = "stub 1") -> Path:
    rows = [
        {
            "key": key,
            "caption": "word " * round(score),
            "expected": score,
            "score": round(score),
            "scorer": scorer,
        }
        for key, score in scores.items()
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_the_verdict_follows_the_data(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    complexity = random.uniform(1, 9, 60)
    noise = random.integers(1000, 90000, 60)
    rows = [
        measurement(f"a/{i}.jpg", c, int(n)) for i, (c, n) in enumerate(zip(complexity, noise, strict=True))
    ]
    good = write_scores(tmp_path / "good.parquet", {f"{i}": float(c) for i, c in enumerate(complexity)})
    by_noise = {f"{i}": 1 + float(n) / 12000 for i, n in enumerate(noise)}
    bad = write_scores(tmp_path / "bad.parquet", by_noise, "caption-length:words 1")
    rows.append({"key": "b.jpg", "error": "damaged"})
    thresholds = RatioThresholds(4, 7)
    sets = [ScoreSet.read(f"good={good}"), ScoreSet.read(f"bad={bad}")]
    results = summarize(collect(rows, sets, thresholds))
    assert results["left_out"] == {"unreadable": 1, "without a score": 0}
    assert results["verdict"].startswith("The score predicts")
    assert results["metrics"]["good"]["pearson"]["value"] > 0.8
    assert [results["metrics"][name]["published"] for name in ("good", "bad", JPEG)] == [0.55, 0.33, 0.31]
    assert results["metrics"]["reconstruction LPIPS"]["pearson"]["value"] == 0  # constant
    pair = results["robustness"]["pairs"][0]
    assert (pair["scorers"], abs(pair["spearman"]) < 0.4) == (["good", "bad"], True)
    reverse = [measurement(f"{i}", 1 + float(n) / 12000, int(n)) for i, n in enumerate(noise)]
    sample = collect(reverse, sets[:1], thresholds)
    assert summarize(sample)["verdict"].startswith("JPEG size predicts")
    title, indices = disagreements(sample, 2)[0]
    assert title == f"good high, {JPEG} low"
    assert complexity[indices].min() > np.median(complexity)
    with pytest.raises(UserError, match="3 images have measurements and scores"):
        collect(rows[:3], sets, thresholds)


def test_files_without_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        ScoreSet.read(str(tmp_path / "missing.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="not a file of scores"):
        ScoreSet.read(str(tmp_path / "other.parquet"))


def test_the_gallery_leaves_out_archives_that_cannot_be_opened(tmp_path: Path) -> None:
    photo = photographs()[0].path
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(photo, "k.jpg")
    (tmp_path / "b.tar").write_bytes(b"damaged")
    images = open_study_images(str(tmp_path))
    rows = measure_all(images, tmp_path / "rows.jsonl", lambda content: {"error": None})
    assert [(row["key"], row["error"] is None) for row in rows] == [
        ("k", True),
        (str(tmp_path / "b.tar"), False),
    ]
    assert ImageLoader(images)("k").size == load_image(photo).size


def test_only_new_and_replaced_images_are_measured_again(tmp_path: Path) -> None:
    folder, calls = tmp_path / "images", []
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jpg").write_bytes(photographs()[0].path.read_bytes())

    def measure() -> list[str]:
        calls.clear()
        images = open_study_images(str(folder))
        rows = measure_all(images, tmp_path / "rows.jsonl", lambda content: {"error": calls.append(content)})
        return [row["key"] for row in rows]

    assert (measure(), len(calls)) == (["a.jpg", "b.jpg"], 2)
    assert (measure(), len(calls)) == (["a.jpg", "b.jpg"], 0)
    other = photographs()[1].path.read_bytes()
    (folder / "a.jpg").write_bytes(other)
    assert measure() == ["a.jpg", "b.jpg"]
    assert calls == [other]


def test_images_of_a_replaced_archive_are_measured_again(tmp_path: Path) -> None:
    calls: list[bytes] = []

    def measure(number: int) -> list[bytes]:
        calls.clear()
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(photographs()[number].path, "k.jpg")
        os.utime(tmp_path / "a.tar", (number, number))
        images = open_study_images(str(tmp_path / "a.tar"))
        rows = measure_all(images, tmp_path / "rows.jsonl", lambda content: {"error": calls.append(content)})
        assert [row["key"] for row in rows] == ["k"]
        return calls

    assert len(measure(0)) == 1
    assert measure(0) == []
    assert measure(1) == [photographs()[1].path.read_bytes()]


def test_files_of_one_scorer_need_names(cat_fast, tmp_path: Path) -> None:  # noqa: F811
    write_scores(tmp_path / "a.parquet", {"k": 1.0}, "other 1")
    write_scores(tmp_path / "b.parquet", {"k": 1.0})
    command = [
        "eval",
        "complexity",
        "--images",
        "photographs",
        "--checkpoint",
        tmp_path,
        "--out",
        tmp_path / "o",
    ]
    for name in ("a", "b", "b"):
        command += ["--scores", tmp_path / f"{name}.parquet"]
    result = cat_fast(*command)
    assert result.exit_code == 2
    assert "two files are named stub;" in " ".join(result.stderr.split())


def test_a_tokenizer_that_was_trained_further_is_another_study(cat_fast, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "tokenizer"
    scores = write_scores(tmp_path / "s.parquet", {p.key: 1.0 + i % 9 for i, p in enumerate(photographs())})
    command = ["eval", "complexity", "--images", "photographs", "--scores", scores, "--out", tmp_path / "o"]
    command += ["--checkpoint", folder, "--size", "32", "--gallery", "0", "--limit", "10"]
    command += ["--distance", "st_lpips_alex"]
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    assert cat_fast(*command).exit_code == 0
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias += 0.1
    tokenizer.save_pretrained(folder)
    result = cat_fast(*command)
    assert result.exit_code == 2
    assert "a study of complexity made with other settings (weights" in " ".join(result.stderr.split())


def test_the_command_studies_the_photographs(cat_fast, checkpoint, tmp_path: Path) -> None:  # noqa: F811
    rows = [
        {"key": p.key, "caption": p.caption, "has_text": p.has_text, "has_faces": p.has_faces}
        for p in photographs()
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores, out = tmp_path / "s.parquet", tmp_path / "study"
    command = ["score", tmp_path / "captions.jsonl", "--scorer", "fast", "--out", scores]
    assert cat_fast(*command).exit_code == 0
    command = ["eval", "complexity", "--images", "photographs", "--scores", scores, "--out", out]
    command += ["--checkpoint", checkpoint, "--size", "64", "--gallery", "1"]
    command += ["--distance", "st_lpips_alex"]
    result = cat_fast(*command)
    assert result.exit_code == 0, result.output
    results = json.loads((out / "study.json").read_text())
    assert results["images"] == len(rows) == 56
    assert set(results["metrics"]) == {
        "fast",
        JPEG,
        "reconstruction MSE",
        "reconstruction LPIPS",
        "caption length",
    }
    assert results["verdict"] in (out / "report.html").read_text()
    table = pyarrow.parquet.read_table(out / "images.parquet")
    assert set(table["best_ratio"].to_pylist()) <= {8, 16, 32}
    assert {path.name for path in out.glob("*.png")} == {
        "best_ratio.png",
        "correlation.png",
        "jpeg_histogram.png",
    }
    lines = (out / "measurements.jsonl").read_text()
    (out / "measurements.jsonl").write_text(lines[:-20])  # a killed run
    assert cat_fast(*command).exit_code == 0
    assert (out / "measurements.jsonl").read_text() == lines
    assert cat_fast(*command, "--limit", "12").exit_code == 0
    assert json.loads((out / "study.json").read_text())["images"] == 12
    assert cat_fast(*command[:-1], "lpips_none").exit_code == 2
