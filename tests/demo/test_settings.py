"""Image size of the demo, with 1024, 256 and 64 tokens per image as in the paper, and its folders."""

import importlib.resources

import pytest

from cat_fast.complexity import tokens_per_image
from cat_fast.config import read_yaml
from cat_fast.demo import DemoSettings, run_demo, run_shipped_demo
from cat_fast.errors import UserError

NANO = read_yaml(importlib.resources.files("cat_fast.configs") / "generator" / "nano.yaml")


def test_images_have_the_papers_token_counts():
    assert [tokens_per_image(f, DemoSettings(ranks=1).resolution) for f in (8, 16, 32)] == [1024, 256, 64]


def test_dit_has_positions_and_token_budget_for_the_longest_image():
    side = DemoSettings(ranks=1).resolution // 8 // NANO["model"]["patch_size"]
    assert NANO["model"]["position_frame"] == side
    assert NANO["data"]["max_tokens"] >= side**2


@pytest.mark.parametrize("run", [run_shipped_demo, lambda out: run_demo(out, DemoSettings.quick(1))])
def test_a_folder_of_an_earlier_version_is_refused_in_one_line(tmp_path, run):
    (tmp_path / "settings.json").write_text('{"ranks": 1, "tokenizer_steps": 400}')
    with pytest.raises(UserError, match="holds a demo of an earlier version; choose another folder") as error:
        run(tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".html"] == []
