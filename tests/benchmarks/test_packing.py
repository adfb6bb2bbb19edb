"""The benchmark of packing, at toy size: every way to batch trains the same, and what it reports is so."""

import numpy as np
import pytest
import torch

from benchmarks import packing
from benchmarks.shared import image_flops, mixes
from benchmarks.shared.mixes import MIXES

TOY = packing.MODEL | {"in_channels": 4, "hidden_size": 32, "num_heads": 2}
RIVALS = {"padded", "dense_mask", "bucketed", "fixed16"}


@pytest.fixture
def toy():
    return packing.cases(4096, 2048, ["252"], TOY)["252"]()


def test_images_at_16x_and_the_dense_mask_are_the_same_in_all_mixes():
    both = [make() for make in packing.cases(2048, 2048, ["252", "197"], TOY).values()]
    assert [set(case.baselines) for case in both] == [RIVALS, RIVALS - {"dense_mask"}]
    first, second = (case.baselines["fixed16"].truth() for case in both)
    assert first is second


def test_all_ways_train_as_one_image_after_another_does(toy, measure_once):
    result = measure_once(toy)
    assert result.right, result.wrong()
    assert set(result.ratios) == RIVALS
    # as many tokens: fewer FLOPs for them at 16x, where no image attends to a thousand tokens
    images = sum(result.details["images"].values())
    assert 0 < toy.expected["fixed16"] < images / 16
    assert result.of_expected["fixed16"] == pytest.approx(
        result.ratios["fixed16"].median / toy.expected["fixed16"]
    )
    assert result.rates["tokens"] == pytest.approx(4096 / images * result.rates["images"])


def test_attention_that_forgets_who_is_whose_is_noticed(toy, monkeypatch, measure_once):
    everything = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask=None, **options: everything(q, k, v, **options),
    )
    assert set(measure_once(toy).wrong()) == {"padded", "dense_mask"}


def test_a_step_that_is_repeated_computes_the_same(toy):
    first, second = ([output.clone() for output in toy.ours.outputs(toy.ours.run())] for _ in range(2))
    assert len(first) == 1 + len(packing.GRADIENTS)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(output.abs().max() > 0 for output in first)


@pytest.mark.parametrize("name", MIXES)
def test_a_batch_is_full_and_like_its_mix(name):
    lengths = packing.compose_lengths(MIXES[name], 16_384)
    assert sum(lengths) == 16_384
    mean = sum(length * share for length, share in MIXES[name].items())
    assert np.mean(lengths) == pytest.approx(mean, rel=0.02)
    for length, share in MIXES[name].items():
        assert lengths.count(length) / len(lengths) == pytest.approx(share, abs=0.05)


def test_flops_of_an_image_agree_with_the_formula():
    """At DiT-XL/2's width, of which the published figures are; a shallow one, as depth cancels."""
    found = image_flops.count_preset({"hidden_size": 1152, "num_heads": 16, "depth": 4})
    for name, mix in MIXES.items():
        tokens = sum(share * length for length, share in mix.items()) / 256
        squares = sum(share * length**2 for length, share in mix.items()) / 256**2
        assert found[name]["attention"] == pytest.approx(squares)
        assert found[name]["linear"] == pytest.approx(tokens, rel=0.01)  # modulation is once an image
    assert found["unit"] == "FLOPs of the forward and backward pass, 2 per multiply-accumulate"
    assert found["216"]["total"] == pytest.approx(0.865, abs=0.003)
    assert found["216"]["images_at_equal_flops"] == pytest.approx(1 / found["216"]["total"])


def test_spread_of_the_packer():
    """Compare with sums over the batches."""
    measured = mixes.measure_packer(MIXES["197"], 20_000, ranks=4)
    assert measured["spread"] < measured["spread_in_turn"] / 5
    assert mixes.spread(np.array([[1.0, 3.0], [2.0, 2.0]])) == 0.25
