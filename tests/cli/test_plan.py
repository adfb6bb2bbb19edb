"""`cat-fast plan`: cost tables that training runs can read, and consistent memory predictions."""

import json
from pathlib import Path

import pytest

from cat_fast.data.sampling.cost_table import CostTable
from tests.cli.conftest import assert_one_line_error

CONFIGS = Path(__file__).parents[2] / "configs"
NANO = CONFIGS / "tokenizer/nano.yaml"
TINY = (
    "model.block_out_channels=[4,4,8,8,8,8]",
    "model.norm_num_groups=2",
    "model.mid_block_attention_head_dim=8",
)


@pytest.mark.parametrize("command", ["cost", "memory"])
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
