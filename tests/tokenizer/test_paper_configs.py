"""Each published row has a configuration with the published values."""

import json
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_fast import NestedAutoencoderKL
from cat_fast.config import fill, read_yaml
from cat_fast.models.build import build_model
from cat_fast.training.config.settings import TokenizerRun

ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads((ROOT / "tests/tokenizer/published.json").read_text())
PRESET = PUBLISHED["preset"]
SIZE = {"cat_c4": 0.015, "cat_c8": 0.015, "cat_c16": 0.015}
"""Relative deviation of the nested models from the published sizes; docs/models.md explains the others."""


def resolve(name):
    return fill(TokenizerRun, read_yaml(ROOT / f"configs/tokenizer/{name}.yaml"), [])


def model_of(name, **changes):
    with torch.device("meta"):
        return build_model(NestedAutoencoderKL, resolve(name).model | changes)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", PUBLISHED["rows"])
def test_every_value_is_the_published_one(name):
    config = asdict(resolve(name))
    expected = PUBLISHED["common"] | PUBLISHED["rows"][name]
    parameters = expected.pop("parameters", None)
    for key, value in expected.items():
        assert reduce(lambda values, part: values[part], key.split("."), config) == value, key
    assert config["output_dir"] == f"runs/{name}"
    count = sum(p.numel() for p in model_of(name).parameters())
    if name in SIZE:
        assert count == pytest.approx(parameters, rel=SIZE[name])


@pytest.mark.parametrize("name", PUBLISHED["rows"])
def test_each_row_has_a_preset_that_differs_in_the_number_of_ranks_only(name):
    preset, row = asdict(resolve(name + PRESET["suffix"])), asdict(resolve(name))
    assert preset["world_size"] == PRESET["world_size"]
    assert preset["world_size"] * preset["data"]["batch_size"] == PRESET["global_batch"]
    own = {"world_size": 0, "output_dir": row["output_dir"]}
    assert preset | own == row
    assert preset["output_dir"] == f"runs/{name}{PRESET['suffix']}"


def test_every_paper_configuration_has_a_published_row():
    configs = {
        path.stem.removesuffix(PRESET["suffix"]) for path in (ROOT / "configs/tokenizer").glob("*.yaml")
    }
    assert {name for name in configs if not name.startswith("nano")} == PUBLISHED["rows"].keys()


@pytest.mark.parametrize(
    ("name", "side", "millions"),
    [("fixed_16x_c16", "encoder and decoder", 9.4), ("fixed_8x_c16", "decoder", 4.7)],
)
def test_fixed_baselines_state_the_channel_matching_that_their_widths_do_not_require(name, side, millions):
    without = {"decoder_matching": []} | ({"encoder_matching": []} if side.startswith("encoder") else {})
    full, lean = (sum(p.numel() for p in model_of(name, **changes).parameters()) for changes in ({}, without))
    assert (full - lean) / 1e6 == pytest.approx(millions, abs=0.05)
    comment = (ROOT / f"configs/tokenizer/{name}.yaml").read_text().split("base:")[0]
    assert f"{millions} M parameters" in comment


@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_a_forward_pass_computes_its_own_ratio_and_nothing_else(ratio):
    """In FLOPs, a nested model equals the fixed one plus channel matching."""
    without_matching = {"encoder_matching": [], "decoder_matching": []} if ratio > 8 else {}  # 8x is narrower
    nested, fixed = model_of("cat_c16"), model_of(f"fixed_{ratio}x_c16", **without_matching)
    x = torch.empty(1, 3, 512, 512, device="meta")
    side = 512 // ratio
    matching = 0
    if ratio == 16:
        for half in (nested.encoder, nested.decoder):
            block = half.channel_matching["16"]
            matching += flops(lambda block=block: block(torch.empty(1, 512, side, side, device="meta")))
    totals = [flops(lambda model=model: model(x, ratio)) for model in (nested, fixed)]
    assert totals[0] == totals[1] + matching
