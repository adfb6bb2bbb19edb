"""`cat-fast demo` around the work: what is asked for reaches it, and what it made is told in five lines."""

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
def asked(monkeypatch):
    """Stands in for the work and notes what it was asked to do."""
    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda *given: calls.append(given) or METRICS)
    return calls


def test_the_settings_and_the_folder_reach_the_demo(cat_fast, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--tokenizer-steps", 7, "--generator-steps", 6, "--ranks", 3, "--sampling-steps", 5]
    assert cat_fast("demo", "--out", "here", *options).exit_code == 0
    ((folder, settings),) = asked
    assert folder == tmp_path / "here"
    assert settings == DemoSettings(tokenizer_steps=7, generator_steps=6, ranks=3, sampling_steps=5)


def test_the_options_left_out_are_those_of_the_settings(cat_fast, asked, tmp_path):
    assert cat_fast("demo", "--out", tmp_path, "--ranks", 2).exit_code == 0
    assert cat_fast("demo", "--out", tmp_path, "--ranks", 2, "--quick").exit_code == 0
    assert [settings for _, settings in asked] == [DemoSettings(ranks=2), DemoSettings.quick(2)]


def test_the_end_is_five_lines_that_say_what_is_where(cat_fast, asked, tmp_path):
    out = tmp_path / "demo[new]"  # which rich would take for markup
    lines = cat_fast("demo", "--out", out).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["report", "tokenizer", "generator", "tokens", "next"]
    assert str(out / "report.html") in lines[0]
    assert str(out / "metrics.json") in lines[0]
    assert "19.3 dB held out, +7.2 over mean colour" in lines[1]
    assert "1.01 -> 0.46" in lines[2]
    assert "108%" in lines[3]
    assert f"--checkpoint {out / 'pipeline' / 'tokenizer'}" in lines[4]


@pytest.mark.parametrize("option", [("--tokenizer-steps", 0), ("--ranks", -1), ("--sampling-steps", "many")])
def test_impossible_numbers_are_usage_errors(cat_fast, asked, option):
    assert cat_fast("demo", *option).exit_code == 2
    assert asked == []


def test_a_demo_that_cannot_go_on_is_one_line(cat_fast, monkeypatch, tmp_path):
    def refuse(*_):
        raise UserError("the folder holds a demo with other settings")

    monkeypatch.setattr(demo, "run_demo", refuse)
    assert_one_line_error(cat_fast("demo", "--out", tmp_path), "other settings")
