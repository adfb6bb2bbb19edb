"""`cat-fast demo` with stubbed demos: options become settings, and results are summarized on a few lines."""

import pytest

from cat_fast import demo
from cat_fast.demo import DemoSettings
from cat_fast.errors import UserError
from tests.cli.conftest import assert_one_line_error

METRICS = {
    "held_out": {
        "mean_colour_psnr": 12.04,
        "chosen": {"psnr": 19.26, "tokens_vs_fixed_16x": 1.08},
    },
    "generator_training": {"first_loss": 1.012, "final_loss": 0.456},
}


@pytest.fixture
def calls(monkeypatch):
    """Stub `run_demo` and record its arguments."""
    recorded = []
    monkeypatch.setattr(demo, "run_demo", lambda *args: recorded.append(args) or METRICS)
    return recorded


def test_options_become_settings(cat_fast, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--tokenizer-steps", 7, "--generator-steps", 6, "--ranks", 3, "--sampling-steps", 5]
    assert cat_fast("demo", "--train", "--out", "here", *options).exit_code == 0
    ((folder, settings),) = calls
    assert folder == tmp_path / "here"
    assert settings == DemoSettings(tokenizer_steps=7, generator_steps=6, ranks=3, sampling_steps=5)


def test_omitted_options_keep_the_default_settings(cat_fast, calls, tmp_path):
    assert cat_fast("demo", "--train", "--out", tmp_path, "--ranks", 2).exit_code == 0
    assert cat_fast("demo", "--out", tmp_path, "--ranks", 2, "--quick").exit_code == 0
    assert [settings for _, settings in calls] == [DemoSettings(ranks=2), DemoSettings.quick(2)]


def test_summary_is_five_lines_with_paths_and_metrics(cat_fast, calls, tmp_path):
    out = tmp_path / "demo[new]"  # brackets, which rich could parse as markup
    lines = cat_fast("demo", "--train", "--out", out).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["report", "tokenizer", "generator", "tokens", "next"]
    assert str(out / "report.html") in lines[0]
    assert str(out / "metrics.json") in lines[0]
    assert "19.3 dB held out, +7.2 over mean colour" in lines[1]
    assert "1.01 -> 0.46" in lines[2]
    assert "108%" in lines[3]
    assert f"--checkpoint {out / 'pipeline' / 'vae'}" in lines[4]


@pytest.mark.parametrize("option", [("--tokenizer-steps", 0), ("--ranks", -1), ("--sampling-steps", "many")])
def test_invalid_numbers_are_usage_errors(cat_fast, calls, option):
    assert cat_fast("demo", *option).exit_code == 2
    assert calls == []


def test_user_error_is_printed_on_one_line(cat_fast, monkeypatch, tmp_path):
    def fail(*_):
        raise UserError("the folder contains a demo with other settings")

    monkeypatch.setattr(demo, "run_demo", fail)
    assert_one_line_error(cat_fast("demo", "--train", "--out", tmp_path), "other settings")


def test_without_train_the_shipped_models_are_shown(cat_fast, calls, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(demo, "run_shipped_demo", lambda folder: shown.append(folder) or METRICS)
    lines = cat_fast("demo", "--out", tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["report", "tokenizer", "tokens", "next"]
    assert shown == [tmp_path]
    assert calls == []
    refused = cat_fast("demo", "--out", tmp_path, "--tokenizer-steps", 5)
    assert_one_line_error(refused, "--tokenizer-steps is for training: add --train")
