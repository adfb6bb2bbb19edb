"""torch.compile (one graph per ratio and direction), memory formats and half precision."""

import pytest
import torch

from tests.tokenizer.test_autoencoder import perturbed, tiny

RATIOS = (8, 16, 32)


class Counting:
    """Compiler backend that runs graphs eagerly and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("head_dim", [1, 16])
def test_one_graph_for_each_ratio_and_direction(head_dim):
    torch._dynamo.reset()
    model = perturbed(tiny(mid_block_attention_head_dim=head_dim))
    x, counting = torch.rand(2, 3, 64, 64), Counting()
    with torch.no_grad():
        encode = torch.compile(
            lambda x, ratio: model.encode(x, ratio).latent_dist.mean, backend=counting, fullgraph=True
        )
        decode = torch.compile(
            lambda z, ratio: model.decode(z, ratio).sample, backend=counting, fullgraph=True
        )
        for round_ in range(2):
            for ratio in RATIOS:
                z = encode(x, ratio)
                torch.testing.assert_close(z, model.encode(x, ratio).latent_dist.mean)
                torch.testing.assert_close(decode(z, ratio), model.decode(z, ratio).sample)
            assert counting.graphs == 2 * len(RATIOS), f"round {round_}"


def test_a_training_step_is_one_graph():
    torch._dynamo.reset()
    model, counting = perturbed(tiny()).train(), Counting()
    x = torch.rand(2, 3, 64, 64)

    def reconstruct(x):
        return model.reconstruct(x, 16, sample_posterior=False)[0]

    plain = torch.autograd.grad(reconstruct(x).square().mean(), model.encoder.conv_in.weight)[0]
    compiled = torch.compile(reconstruct, backend=counting, fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().mean(), model.encoder.conv_in.weight)[0]
    torch.testing.assert_close(got, plain)
    assert counting.graphs == 1


@torch.no_grad()
@pytest.mark.parametrize("ratio", RATIOS)
def test_channels_last_gives_the_same_and_is_preserved(ratio):
    model = perturbed(tiny())
    x = torch.rand(2, 3, 64, 96)
    expected = model.encode(x, ratio).latent_dist.mean
    latent = (
        model.to(memory_format=torch.channels_last)
        .encode(x.to(memory_format=torch.channels_last), ratio)
        .latent_dist.mean
    )
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    assert model.decode(latent, ratio).sample.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("ratio", RATIOS)
def test_half_precision_keeps_statistics_in_float32(ratio):
    """With a bright image of low contrast, statistics in bf16 would have a large error."""
    model = perturbed(tiny())
    x = 3 + 0.05 * torch.rand(1, 3, 64, 64)
    expected = model.encode(x, ratio).latent_dist.mean
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = model.encode(x, ratio).latent_dist.mean.float()
    whole = model.to(torch.bfloat16).encode(x.bfloat16(), ratio).latent_dist.mean.float()
    scale = expected.abs().max()
    assert (automatic - expected).abs().max() / scale < 0.1
    assert (whole - expected).abs().max() / scale < 0.1
