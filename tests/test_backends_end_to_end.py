"""The models compute the same outputs and gradients on every backend of this machine."""

import pytest
import torch

from cat_fast import NestedAutoencoderKL
from cat_fast.generator import DiT
from cat_fast.kernels import backends
from cat_fast.packing import PackedSequence

TOKENIZER_OPERATORS = {"group_norm_silu", "scalar_attention"}
DIT_OPERATORS = {"pack", "adaln", "gate_residual_adaln", "varlen_attention"}


def needs(backend, operators):
    """Skip if one of the operators lacks the backend, so that no fallback is compared with itself."""
    for row in backends.report():
        if row.backend == backend and row.op in operators and row.status != "active":
            pytest.skip(f"{row.op} {backend}: {row.status}")


def output_and_gradients(model, compute):
    """Return the output of `compute`, and the gradients of a fixed weighted sum of it in all parameters."""
    model.zero_grad()
    y = compute()
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    (y * weight).sum().backward()
    return {"output": y.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_close(got, expected):
    """Assert equality to 1e-4 of the largest value.

    Some gradients, such as that of the keys' bias, are zero up to rounding; they are compared relative to 1 %
    of the largest gradient.
    """
    assert got.keys() == expected.keys()
    largest = max(reference.abs().max() for reference in expected.values())
    for name, reference in expected.items():
        error = (got[name] - reference).abs().max() / reference.abs().max().clamp(min=1e-2 * largest)
        assert error <= 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("backend", "ratio"), [("cpp", 8), ("cpp", 32), ("triton", 8)])
def test_the_nested_vae_does_not_depend_on_the_backend(monkeypatch, backend, ratio):
    needs(backend, TOKENIZER_OPERATORS)
    torch.manual_seed(0)
    model = NestedAutoencoderKL(
        block_out_channels=(4, 4, 4, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=2,
        mid_block_num_layers=1,
        mid_block_attention_head_dim=1,
        layers_per_block=1,
    )
    x = torch.randn(1, 3, 32, 32).to(memory_format=torch.channels_last)

    def reconstruct():
        return model.decode(model.encode(x, ratio).latent_dist.mode(), ratio).sample

    monkeypatch.setenv("CAT_FAST_BACKEND", "reference")
    expected = output_and_gradients(model, reconstruct)
    monkeypatch.setenv("CAT_FAST_BACKEND", backend)
    assert_close(output_and_gradients(model, reconstruct), expected)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_the_dit_does_not_depend_on_the_backend(monkeypatch, backend):
    needs(backend, DIT_OPERATORS)
    torch.manual_seed(0)
    model = DiT(in_channels=4, hidden_size=144, depth=2, num_heads=2, num_classes=10, position_frame=8)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a fresh model predicts zero
                parameter.normal_(std=0.05)
    model.eval()
    latents = [torch.randn(4, 2 * h, 2 * w) for h, w in ((4, 4), (8, 8), (2, 3))]

    def predict():
        packed = PackedSequence.from_latents(latents, (16, 8, 32), labels=[1, 2, 3])
        return model(packed, torch.tensor([10, 500, 900])).sample

    monkeypatch.setenv("CAT_FAST_BACKEND", "reference")
    expected = output_and_gradients(model, predict)
    monkeypatch.setenv("CAT_FAST_BACKEND", backend)
    assert_close(output_and_gradients(model, predict), expected)
