"""The benchmark of the autoencoder, at toy size: the stock model computes what ours does."""

import pytest
import torch

from benchmarks import autoencoder
from tests.tokenizer.test_autoencoder import perturbed, tiny


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
def test_ours_and_the_stock_model_agree_with_float64(key, measure_once):
    result = measure_once(autoencoder.cases(64, toy)[key]())
    assert result.right, result.wrong()
    literal = key.startswith("heads512.")
    stock = set() if literal else {"channels_last_eager", "channels_last_compile"}
    assert set(result.ratios) == {"nchw_eager", *stock}
    assert (result.work.get("of_matmul_rate", 0) > 0) == (not literal)
    assert result.breakdown["seconds"]["convolution"] > 0
    assert result.breakdown["peak_bytes"]["convolution"] > 0


def test_a_training_step_that_is_repeated_computes_the_same():
    ours = autoencoder.cases(64, toy)["heads1.16x.train.fp32"]().ours
    first, second = ([output.clone() for output in ours.outputs(ours.run())] for _ in range(2))
    assert len(first) == 1 + len(autoencoder.GRADIENTS)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(output.abs().max() > 0 for output in first)
