"""On GPUs the GroupNorm of a ResNet block adds the bias of its first convolution; here on the CPU."""

import pytest
import torch
from torch.testing import assert_close

from cat_fast.tokenizer import blocks
from cat_fast.tokenizer.blocks import ResnetBlock


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = ResnetBlock(8, 12, norm_num_groups=4)
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    torch.nn.init.normal_(block.conv1.bias)
    return block


def value_and_gradients(block, x):
    leaves = {"x": x, **dict(block.named_parameters())}
    y = block(x)
    gradients = torch.autograd.grad(y.square().sum(), [*leaves.values()])
    return y, dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_block_is_the_same_if_the_norm_adds_the_bias(block, monkeypatch, memory_format):
    block = block.double()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    want, want_gradients = value_and_gradients(block, x)
    monkeypatch.setattr(blocks, "leaves_bias_to_norm", lambda x: True)
    got, gradients = value_and_gradients(block, x)
    assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got.stride() == want.stride()
    assert gradients["conv1.bias"].abs().max() > 0
    assert_close(gradients, want_gradients, rtol=1e-10, atol=1e-10)


def test_autocast_gives_the_same_dtypes(block, monkeypatch):
    x = torch.randn(2, 8, 5, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, want_gradients = value_and_gradients(block, x)
        monkeypatch.setattr(blocks, "leaves_bias_to_norm", lambda x: True)
        got, gradients = value_and_gradients(block, x)
    assert got.dtype == want.dtype
    assert_close(got, want, rtol=0.1, atol=0.1)
    assert {n: g.dtype for n, g in gradients.items()} == {n: g.dtype for n, g in want_gradients.items()}


def test_weights_of_either_path_are_the_same(block):
    expected = {"norm1", "conv1", "norm2", "conv2", "conv_shortcut"}
    assert {name.split(".")[0] for name in block.state_dict()} == expected
    assert "conv1.bias" in block.state_dict()


def test_cpus_add_the_bias_in_the_convolution(block):
    _h, bias = block.conv1(torch.randn(1, 8, 4, 4))
    assert bias is None
