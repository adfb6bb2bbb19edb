"""`cat-fast plan`: cost tables that training runs can read, and consistent memory predictions."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from cat_fast.data.images.index import ImageRecord, write_index
from cat_fast.data.sampling.cost_table import CostTable
from tests.cli.conftest import assert_one_line_error

CONFIGS = Path(__file__).parents[2] / "configs"
NANO = CONFIGS / "tokenizer/nano.yaml"
TINY = (
    "model.block_out_channels=[4,4,8,8,8,8]",
    "model.norm_num_groups=2",
    "model.mid_block_attention_head_dim=8",
)


@pytest.mark.parametrize("command", ["cost", "memory", "jpeg"])
def test_help_shows_an_example(cat_fast, command):
    assert f"cat-fast plan {command} configs/" in cat_fast("plan", command, "--help").stdout


def test_measured_cost_table_can_be_read(cat_fast, tmp_path):
    path = tmp_path / "costs.json"
    result = cat_fast(
        *("plan", "cost", NANO, *TINY, "data.image_size=64"),
        *("--batches", "1,16", "--repeats", 2, "--json", path),  # far enough apart for a busy machine
    )
    assert result.exit_code == 0, result.output
    table = CostTable.read(path)
    assert set(table.costs) == {8, 16, 32}
    assert table.unit == "seconds"
    assert table.about["side"] == 64
    assert table.about["machine"]["cpu"]["threads"] > 0
    assert "measured" in result.stdout


@pytest.mark.parametrize("command", [["cost", "--count"], ["memory"]])
def test_crops_of_any_size_are_planned_and_unfit_ones_refused(cat_fast, command):
    def plan(*overrides):
        return cat_fast("plan", *command, NANO, *TINY, "data.image_size=[48,96]", *overrides)

    result = plan("model.ratios=[8,16]")
    assert result.exit_code == 0, result.output
    assert "16x" in result.stdout
    assert_one_line_error(plan(), "data.image_size: 48 × 96 pixels: 48 is not a multiple of the ratio 32")
    too_large = plan("model.ratios=[8,16]", "discriminator.resolution=64")
    assert_one_line_error(too_large, "data.image_size: crops of 48 × 96 pixels are smaller", "64 × 64")


def test_counted_cost_table_is_labelled_as_fallback(cat_fast, tmp_path):
    path = tmp_path / "costs.json"
    result = cat_fast("plan", "cost", NANO, *TINY, "--count", "--json", path)
    assert result.exit_code == 0, result.output
    assert "fallback" in result.stdout
    assert CostTable.read(path).unit == "flops"
    assert "fallback" in CostTable.read(path).about["what"]


def test_memory_is_predicted_by_ratio_and_batch_size(cat_fast, tmp_path):
    path = tmp_path / "memory.json"
    result = cat_fast("plan", "memory", NANO, "--ranks", 4, "--gpu", "A100-40", "--json", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert "predicted" in report["what"]
    assert "Predicted" in result.stdout
    assert set(report["peak"]) == {"8", "16", "32"}
    for ratio, peaks in report["peak"].items():
        sizes = list(peaks.values())
        assert sizes == sorted(sizes)
        assert sizes[0] > sum(report["at_rest"].values())
        assert report["largest_batch"][ratio]["A100-40"] > 32
        assert f"{ratio}x" in result.stdout


@pytest.mark.slow
def test_memory_of_the_papers_model_needs_no_weights_or_data(cat_fast, tmp_path):
    path = tmp_path / "memory.json"
    result = cat_fast("plan", "memory", CONFIGS / "tokenizer/cat_c16_64xA100.yaml", "--json", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["ranks"] == 64
    for ratio in ("8", "16", "32"):
        largest = report["largest_batch"][ratio]
        assert 0 < largest["A100-40"] < largest["A100-80"] == largest["H100-80"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("memory", NANO, "--gpu", "TPU"), ("--gpu", "A100-40")),
        (("memory", NANO, "precision=fp8"), ("fp8", "bf16")),
        (("memory", NANO, "model.ratios=[3]"), ("expected powers of two", "got 3")),
        (("memory", CONFIGS / "generator/nano.yaml"), ("expected task 'tokenizer'", "got 'generator'")),
        (("cost", NANO, "--batches", "a"), ("--batches", "2,4,8")),
        (("cost", NANO, *TINY, "--batches", "2"), ("at least two",)),
        (("cost", NANO, "--json", "/"), ("/",)),
        (("cost", "none.yaml"), ("none.yaml",)),
    ],
)
def test_invalid_arguments_are_reported_on_one_line(cat_fast, arguments, words):
    assert_one_line_error(cat_fast("plan", *arguments), *words)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Index of 120 images whose JPEG sizes grow with their number; scores 1 to 9 in blocks."""
    folder = tmp_path_factory.mktemp("scored")
    rng = np.random.default_rng(0)
    flags = {"caption": "a", "has_text": False, "has_faces": False, "ratio": 16}
    records = []
    for n in range(120):
        pixels = 128 + rng.integers(-1 - n, 2 + n, (16, 16, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{n:03d}.png")
        records.append(ImageRecord(key=str(n), path=f"{n:03d}.png", score=1 + n * 9 // 120, **flags))
    write_index(folder / "index.jsonl", records)
    return folder


def test_jpeg_thresholds_are_fitted_to_the_mix_of_the_scores_or_to_a_given_one(cat_fast, scored, tmp_path):
    path = tmp_path / "fit.json"
    for override, options, mix in (
        (f"data.index={scored / 'index.jsonl'}", (), {"8": 26 / 120, "16": 40 / 120, "32": 54 / 120}),
        (f"data.folder={scored}", ("--mix", "0.1,0.3,0.6"), {"8": 0.1, "16": 0.3, "32": 0.6}),
    ):
        result = cat_fast("plan", "jpeg", NANO, override, "data.thresholds=[4,7]", *options, "--json", path)
        assert result.exit_code == 0, result.output
        report = json.loads(path.read_text())
        assert report["images"] == 120
        assert report["mix"] == pytest.approx(mix)
        assert report["fitted"] == pytest.approx(report["mix"])
        assert report["configured"] == {"8": 0, "16": 0, "32": 1}
        a, b = report["data.jpeg_thresholds"]
        assert f"120 images: data.jpeg_thresholds=[{a},{b}]" in result.stdout


def test_jpeg_thresholds_that_cannot_be_fitted_are_one_line(cat_fast, scored):
    folder, index = f"data.folder={scored}", f"data.index={scored / 'index.jsonl'}"
    for arguments, *reasons in (
        ((folder, "--images", 5), "no scores", "--mix"),
        ((folder, "--mix", "0.5,0.5"), "expected three shares"),
        ((folder, "--mix", "0.5,0.5,0.5"), "sum to 1"),
        ((index, "--images", 5), "at least 100 images, got 5"),
        ((index, "data.jpeg_thresholds=[7,3]"), "data.jpeg_thresholds", "0 <= a <= b"),
        ((index, "data.jpeg_thresholds=[7]"), "data.jpeg_thresholds: expected two"),
    ):
        assert_one_line_error(cat_fast("plan", "jpeg", NANO, *arguments), *reasons)


@pytest.fixture(scope="module")
def score_files(tmp_path_factory):
    """The published distribution of scores as a table and as JSON lines, half of the images each."""
    folder = tmp_path_factory.mktemp("scores")
    counts = {1: 20, 2: 30, 3: 80, 4: 80, 5: 80, 6: 80, 7: 80, 8: 47, 9: 3}
    scores = [score for score, count in counts.items() for _ in range(count)]
    spread = [(n * 7919 % 500) / 500 - 0.499 for n in range(500)]
    rows = [
        {"key": str(n), "score": score, "expected": min(max(score + part, 1.0), 9.0)}
        for n, (score, part) in enumerate(zip(scores, spread, strict=True))
    ]
    rows.append({"key": "failed", "score": None, "expected": None})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[::2]), folder / "a.parquet")
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1::2]))
    return folder


def test_budget_lists_the_thresholds_near_a_fixed_ratio(cat_fast, score_files, tmp_path):
    files = (score_files / "a.parquet", score_files / "b.jsonl")
    result = cat_fast("plan", "budget", *files, "--json", tmp_path / "budget.json")
    assert result.exit_code == 0, result.output
    assert "500 images: the most diverse thresholds are 4,7" in result.stdout
    assert "rows without a complexity score, which are not counted: 1" in result.stderr
    report = json.loads((tmp_path / "budget.json").read_text())
    assert (report["images"], report["unscored"], report["within_budget"]) == (500, 1, None)
    listed = {tuple(one["thresholds"]): one for one in report["candidates"]}
    assert {(4, 7), (2, 8)} <= listed.keys()
    assert listed[4, 7] == report["default"]
    assert listed[4, 7]["mix"] == pytest.approx({"8": 0.10, "16": 0.48, "32": 0.42})
    assert listed[2, 8]["mean_tokens"] == pytest.approx((3 * 1024 + 447 * 256 + 50 * 64) / 500)
    for pair in listed:
        assert f"{pair[0]},{pair[1]}" in result.stdout


def test_budget_of_mean_tokens_gives_real_valued_thresholds(cat_fast, score_files, tmp_path):
    files = (score_files / "a.parquet", score_files / "b.jsonl")
    result = cat_fast("plan", "budget", *files, "--mean-tokens", 197, "--json", tmp_path / "budget.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "budget.json").read_text())["within_budget"]
    assert 197 - 192 / 500 < found["mean_tokens"] <= 197
    assert (
        f"thresholds {found['thresholds'][0]},{found['thresholds'][1]} keep 197 mean tokens" in result.stdout
    )


def test_unusable_files_of_scores_are_one_line(cat_fast, score_files, tmp_path):
    good = score_files / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "keys.parquet")
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-40])
    for name, text in (
        ("text.jsonl", '{"score": "5"}\n'),
        ("broken.jsonl", '{"score": 5}\n{"score": 5\n'),
        ("none.jsonl", '{"score": 5.63}\n{"caption": "a"}\n'),
        ("same.jsonl", '{"score": 5}\n'),
    ):
        (tmp_path / name).write_text(text)
    for arguments, *reasons in (
        ((tmp_path / "missing.parquet",), "missing.parquet"),
        ((tmp_path / "keys.parquet",), 'expected a column "score", got key'),
        ((tmp_path / "cut.parquet",), "cannot be read as a Parquet file"),
        ((tmp_path / "scores.csv",), "expected a .parquet or .jsonl file"),
        ((tmp_path / "text.jsonl",), "line 1", "score: expected an integer from 1 to 9, got '5'"),
        ((tmp_path / "broken.jsonl",), "line 2"),
        ((tmp_path / "none.jsonl",), "no complexity scores in 2 rows"),
        ((tmp_path / "same.jsonl",), "all images one ratio: their scores are 5"),
        ((tmp_path / "same.jsonl", "--mean-tokens", 197), "1 of 1 scores have no expected score"),
        ((good, "--mean-tokens", 63), "images of 512 px cost 64 tokens at 32x to 1024 at 8x"),
        ((good, "--target-ratio", 40), "expected 8 to 32"),
        ((good, "--target-ratio", 31), "no thresholds keep the average ratio", "reach"),
        ((good, "--resolution", 500), "multiple of 64 px"),
    ):
        assert_one_line_error(cat_fast("plan", "budget", *arguments), *reasons)
