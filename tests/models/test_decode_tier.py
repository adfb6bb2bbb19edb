"""Decoding tiers: `fast` runs a compiled decoder that agrees with `exact`, or `exact` with a reason."""

import logging

import pytest
import torch
from torch import nn

from cat_fast.errors import UserError
from cat_fast.models.decode_tier import decode_tier, use_decode_tier
from cat_fast.tokenizer import NestedAutoencoderKL

TINY = {"block_out_channels": [8] * 6, "latent_channels": 4, "norm_num_groups": 4, "mid_block_num_layers": 1}


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return NestedAutoencoderKL.from_config(TINY).eval()


def compile_to(monkeypatch, change):
    """Replace compilation: a compiled module changes its results by a function."""

    def compile_module(self, dynamic):
        def run(*arguments):
            return change(type(self).forward(self, *arguments))

        self._compiled_call_impl = run

    monkeypatch.setattr(nn.Module, "compile", compile_module)


def test_the_default_is_exact(tokenizer):
    assert decode_tier(tokenizer) == use_decode_tier(tokenizer, "exact") == "exact"


def test_fast_runs_the_compiled_decoder_until_exact_is_chosen(tokenizer, monkeypatch):
    latents = torch.randn(1, 4, 2, 2)
    exact = tokenizer.decode(latents, 16).sample
    compile_to(monkeypatch, lambda images: images + 1e-4)
    assert use_decode_tier(tokenizer, "fast") == decode_tier(tokenizer) == "fast"
    difference = tokenizer.decode(latents, 16).sample - exact
    assert difference.mean().item() == pytest.approx(1e-4, rel=1e-2)
    use_decode_tier(tokenizer, "exact")
    assert torch.equal(tokenizer.decode(latents, 16).sample, exact)


@pytest.mark.parametrize("change", [lambda images: images + 0.01, lambda images: images * torch.nan])
def test_images_that_do_not_agree_are_not_used(tokenizer, monkeypatch, caplog, change):
    compile_to(monkeypatch, change)
    with caplog.at_level(logging.WARNING, "cat_fast.models"):
        assert use_decode_tier(tokenizer, "fast") == "exact"
    assert "at 8x, compiled images differ by" in caplog.text


def test_a_decoder_that_does_not_compile_is_not_used(tokenizer, monkeypatch, caplog):
    def fails(images):
        raise RuntimeError("no compiler")

    compile_to(monkeypatch, fails)
    with caplog.at_level(logging.WARNING, "cat_fast.models"):
        assert use_decode_tier(tokenizer, "fast") == "exact"
    assert "the decoder does not compile: no compiler" in caplog.text
    assert tokenizer.decode(torch.randn(1, 4, 2, 2), 16).sample.isfinite().all()


def test_an_unknown_tier_is_an_error(tokenizer):
    with pytest.raises(UserError, match="--tier best: expected exact or fast"):
        use_decode_tier(tokenizer, "best")


@pytest.mark.slow
def test_the_compiler_of_torch_passes_the_self_test(tokenizer):
    """A minute: it compiles C++."""
    assert use_decode_tier(tokenizer, "fast") == "fast"
    assert use_decode_tier(tokenizer, "exact") == "exact"
