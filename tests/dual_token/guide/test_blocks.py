"""Blocks of the guide's decoder against diffusers' MoVQ blocks."""

import pytest
import torch
from diffusers.models.attention_processor import SpatialNorm as PublishedNorm
from diffusers.models.resnet import ResnetBlockCondNorm2D

from cat_fast.dual_token.guide.blocks import (
    ConditionedAttention,
    ConditionedMidBlock,
    ConditionedResnetBlock,
    SpatialNorm,
)


def features(channels=32, size=(6, 10)):
    torch.manual_seed(1)
    return torch.randn(2, channels, *size), torch.randn(2, 5, 3, 5)


def test_spatial_norm_equals_movqs():
    x, q = features()
    published = PublishedNorm(32, 5)
    ours = SpatialNorm(32, 5, 32)
    ours.load_state_dict(published.state_dict())
    torch.testing.assert_close(ours(x, q), published(x, q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out_channels", [32, 64])
def test_residual_block_equals_movqs(out_channels):
    x, q = features()
    published = ResnetBlockCondNorm2D(
        in_channels=32, out_channels=out_channels, temb_channels=5, time_embedding_norm="spatial", eps=1e-6
    )
    ours = ConditionedResnetBlock(32, out_channels, 5, 32)
    ours.load_state_dict(published.state_dict())
    torch.testing.assert_close(ours(x, q), published(x, q), rtol=1e-5, atol=1e-5)


def test_attention_is_conditioned_by_the_codes():
    x, q = features(16)
    block = ConditionedAttention(16, 8, 5, 4)
    normed = block.spatial_norm(x, q).flatten(2).transpose(1, 2)
    heads = [
        linear(normed).unflatten(2, (2, 8)).transpose(1, 2) for linear in (block.to_q, block.to_k, block.to_v)
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    expected = x + block.to_out[0](expected).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x, q), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(block(x, q), block(x, -q))


def test_all_parameters_of_a_mid_block_are_trained():
    x, q = features(16)
    block = ConditionedMidBlock(16, 1, 16, 5, 4)
    block(x, q).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in block.named_parameters()
               if "to_k.bias" not in name)  # fmt: skip
