"""What the demo promises of its sizes: images as the paper's, of 1024, 256 and 64 tokens."""

import importlib.resources

from cat_fast.complexity import tokens_per_image
from cat_fast.config import read_yaml
from cat_fast.demo import DemoSettings

NANO = read_yaml(importlib.resources.files("cat_fast.configs") / "generator" / "nano.yaml")


def test_it_draws_images_of_the_papers_token_counts():
    assert [tokens_per_image(f, DemoSettings(ranks=1).resolution) for f in (8, 16, 32)] == [1024, 256, 64]


def test_the_generator_has_a_place_for_every_token_and_room_for_the_longest_image():
    side = DemoSettings(ranks=1).resolution // 8 // NANO["model"]["patch_size"]
    assert NANO["model"]["position_frame"] == side
    assert NANO["data"]["max_tokens"] >= side**2
