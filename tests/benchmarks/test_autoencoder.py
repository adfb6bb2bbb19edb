"""The benchmark of the autoencoder, at toy size: the stock model computes what ours does."""

import pytest
import torch

from benchmarks import autoencoder, harness
from tests.tokenizer.test_autoencoder import perturbed, tiny

ONCE = harness.Effort(least_pairs=1, most_pairs=1, seconds=0.0)


def toy(head_dim, ratio):
    model = tiny(
        block_out_channels=(8, 8, 8, 16, 32, 32),
        ratios=(ratio,),
        mid_block_attention_head_dim=min(head_dim, 32),
    )
    return perturbed(model)


@pytest.fixture(autouse=True)
def without_compiling(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("key", autoencoder.cases(64, toy))
def test_ours_and_the_stock_model_agree_with_float64(key):
    result = harness.measure(autoencoder.cases(64, toy)[key](), ONCE)
    assert result.right, result.wrong()
    rivals = {"nchw_eager"} if key.startswith("heads512") else set(result.ratios)
    assert set(result.ratios) == rivals
    assert len(rivals) == (1 if key.startswith("heads512") else 4)
