"""Decoding tiers: `fast` runs a compiled decoder that agrees with `exact`, or `exact` with a reason."""

import logging

import pytest
import torch
from torch import nn

from cat_fast.errors import UserError
from cat_fast.models.decode_tier import decode_tier, use_decode_tier
from cat_fast.tokenizer import NestedAutoencoderKL
from tests.fake_compiler import compile_to

TINY = {
    "sample_size": 64,
    "block_out_channels": [8] * 6,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_num_layers": 1,
}


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return NestedAutoencoderKL.from_config(TINY).eval()


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


def test_an_offloaded_tokenizer_is_not_compiled(tokenizer, monkeypatch, caplog):
    compile_to(monkeypatch, lambda images: images)
    tokenizer._hf_hook = object()
    with caplog.at_level(logging.WARNING, "cat_fast.models"):
        assert use_decode_tier(tokenizer, "fast") == "exact"
    assert "the tokenizer is offloaded" in caplog.text


def test_images_are_tested_one_by_one_and_in_batches(tokenizer, monkeypatch, caplog):
    compile_to(monkeypatch, lambda images: images if len(images) == 1 else images + 0.01)
    with caplog.at_level(logging.WARNING, "cat_fast.models"):
        assert use_decode_tier(tokenizer, "fast") == "exact"
    assert "compiled images differ" in caplog.text


def test_float16_is_tested_in_the_dtype_in_which_it_decodes(tokenizer, monkeypatch):
    dtypes = set()
    compile_to(monkeypatch, lambda images: dtypes.add(images.dtype) or images)
    assert use_decode_tier(tokenizer.half(), "fast") == "fast"
    assert dtypes == {torch.float32}
    assert tokenizer.dtype == torch.float16


def test_an_unknown_tier_is_an_error(tokenizer):
    with pytest.raises(UserError, match="--tier best: expected exact or fast"):
        use_decode_tier(tokenizer, "best")


@torch.no_grad()
def exact_and_fast():
    """Return square images by both tiers, one by one and in a batch; none of them may compile."""
    torch.manual_seed(0)
    tokenizer = NestedAutoencoderKL.from_config(TINY | {"ratios": [8, 16]}).eval()
    cases = [
        (ratio, torch.randn(count, 4, 64 // ratio, 64 // ratio)) for ratio in (8, 16) for count in (1, 3)
    ]
    exact = [tokenizer.decode(z, ratio).sample for ratio, z in cases]
    assert use_decode_tier(tokenizer, "fast", 64) == "fast"
    with torch.compiler.set_stance("fail_on_recompile"):
        return exact, [tokenizer.decode(z, ratio).sample for ratio, z in cases]


@pytest.mark.slow
def test_images_compile_nothing(monkeypatch):
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, dynamic: compile_module(self, dynamic=dynamic, backend="eager")
    )
    torch.testing.assert_close(*exact_and_fast())


@pytest.mark.slow
def test_images_of_torchs_compiler_agree():
    """A minute: it compiles C++."""
    for expected, ours in zip(*exact_and_fast(), strict=True):
        error = (ours.clamp(-1, 1) - expected.clamp(-1, 1)).square().mean().item()
        assert error <= 4 * 10**-6, "less than 60 dB"
