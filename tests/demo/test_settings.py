"""Image size of the demo: as in the paper, with 1024, 256 and 64 tokens per image."""

import importlib.resources

from cat_fast.complexity import tokens_per_image
from cat_fast.config import read_yaml
from cat_fast.demo import DemoSettings

NANO = read_yaml(importlib.resources.files("cat_fast.configs") / "generator" / "nano.yaml")


def test_images_have_the_papers_token_counts():
    assert [tokens_per_image(f, DemoSettings(ranks=1).resolution) for f in (8, 16, 32)] == [1024, 256, 64]


def test_dit_has_positions_and_token_budget_for_the_longest_image():
    side = DemoSettings(ranks=1).resolution // 8 // NANO["model"]["patch_size"]
    assert NANO["model"]["position_frame"] == side
    assert NANO["data"]["max_tokens"] >= side**2
