"""The committed results of packing reach their floors for every baseline and for the packer."""

import json
from pathlib import Path

import pytest

from benchmarks.shared.committed import committed

MEASURED = json.loads(committed("packing").read_text(encoding="utf-8"))
AT_LEAST = {
    "252.ratio_vs_padded": 4.0,
    "197.ratio_vs_padded": 4.7,
    "252.ratio_vs_bucketed": 1.0,
    "216.ratio_vs_bucketed": 1.0,
    "197.ratio_vs_bucketed": 1.0,
    "252.ratio_vs_dense_mask": 3.0,
    "216.ratio_vs_fixed16": 1.10,
    "197.ratio_vs_fixed16": 1.20,
}


@pytest.mark.parametrize(("key", "least"), AT_LEAST.items())
def test_training_on_packed_images_is_as_fast_as_promised(key, least):
    assert MEASURED[key] >= least


@pytest.mark.parametrize("mix", ["252", "216", "197"])
def test_fewer_tokens_give_the_images_that_their_flops_let_expect(mix):
    case = MEASURED["cases"][mix]
    assert case["right"]
    assert case["of_expected"]["fixed16"] >= 0.97
    assert case["details"]["max_tokens"] == case["details"]["checked_tokens"] == 16_384


@pytest.mark.parametrize(("mix", "least"), [("252", 0.99), ("216", 0.99), ("197", 0.99), ("uniform", 0.97)])
def test_batches_are_full_and_soon_planned(mix, least):
    measured = MEASURED["packer"]["mixes"][mix]
    assert measured["fill"] >= least
    assert measured["seconds"] < 5


def test_every_preset_is_counted():
    configs = Path(__file__).parents[2] / "configs/generator"
    assert MEASURED["flops_per_image"]["presets"].keys() == {path.stem for path in configs.glob("*.yaml")}
