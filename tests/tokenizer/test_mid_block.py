"""Mid block with one-dimensional heads, the paper's literal reading, against SDPA and diffusers."""

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D
from torch.testing import assert_close

from cat_fast import NestedAutoencoderKL
from cat_fast.tokenizer.blocks import Attention


def sdpa(attention, x):
    """Compute `attention` with torch's own operator, one head per channel."""
    h = attention.group_norm(x).flatten(2).transpose(1, 2)
    q, k, v = (
        layer(h).transpose(1, 2).unsqueeze(-1) for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    out = F.scaled_dot_product_attention(q, k, v).squeeze(-1).transpose(1, 2)
    return x + attention.to_out[0](out).transpose(1, 2).view_as(x)


def test_heads_of_one_dimension_equal_sdpa_gradients_too():
    torch.manual_seed(0)
    attention = Attention(channels=24, head_dim=1, norm_num_groups=4)
    x = torch.randn(2, 24, 16, 10, requires_grad=True)
    leaves = [x, *attention.parameters()]
    grad = torch.randn_like(x)
    got, want = attention(x), sdpa(attention, x)
    assert_close(got, want, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        scale = theirs.abs().max().clamp(min=1.0)  # the gradient of to_k's bias is zero up to rounding
        assert_close(ours / scale, theirs / scale, atol=1e-5, rtol=0)


def test_the_mid_block_of_the_model_is_that_of_diffusers():
    torch.manual_seed(0)
    model = NestedAutoencoderKL(
        block_out_channels=(8, 8, 8, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_num_layers=2,
        mid_block_attention_head_dim=1,
    )
    theirs = UNetMidBlock2D(
        in_channels=16,
        temb_channels=None,
        num_layers=2,
        resnet_eps=1e-6,
        resnet_groups=4,
        attention_head_dim=1,
    )
    ours = model.decoder.mid_block
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 12, 8)
    assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
