"""The nested VAE: shapes, layers in use, sizes, and agreement with diffusers' AutoencoderKL."""

import pytest
import torch
from diffusers import AutoencoderKL

from cat_fast import NestedAutoencoderKL

PAPER = {"mid_block_num_layers": 8, "mid_block_attention_head_dim": 1}


def tiny(**changes):
    torch.manual_seed(0)
    arguments = {
        "sample_size": 64,
        "block_out_channels": (8, 8, 8, 16, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_num_layers": 1,
        "mid_block_attention_head_dim": 16,
        "ratios": (8, 16, 32),
    }
    return NestedAutoencoderKL(**arguments | changes)


def perturbed(model):
    """Return the model with noise on all weights, because zero residual branches would hide errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("ratio", [8, 16, 32])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64)])
def test_latent_and_image_have_the_sides_of_the_ratio(ratio, height, width):
    model = tiny()
    posterior = model.encode(torch.rand(2, 3, height, width), ratio).latent_dist
    assert posterior.mean.shape == (2, 4, height // ratio, width // ratio)
    assert model.decode(posterior.mode(), ratio).sample.shape == (2, 3, height, width)


@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_only_the_layers_of_a_ratio_run(ratio):
    model, ran = tiny(), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    model(torch.rand(1, 3, 64, 64), ratio)
    level = {8: 3, 16: 4, 32: 5}[ratio]
    for k in range(6):
        used = f"encoder.down_blocks.{k}.resnets.0" in ran
        assert used == (k <= level), f"encoder block {k}"
        assert (f"decoder.up_blocks.{k}" in ran) == (k >= 5 - level), f"decoder block {k}"
        assert (f"encoder.down_blocks.{k}.downsamplers.0" in ran) == (k < level)
    for f in (8, 16):
        assert (f"encoder.channel_matching.{f}" in ran) == (f == ratio)


def test_a_latent_depends_on_its_own_image_only():
    model = perturbed(tiny())
    images = torch.rand(3, 3, 64, 64)
    together = model.encode(images, 16).latent_dist.mean
    alone = torch.cat([model.encode(x[None], 16).latent_dist.mean for x in images])
    torch.testing.assert_close(
        together, alone, rtol=1e-4, atol=1e-4
    )  # convolutions sum in batch-dependent order


@pytest.mark.parametrize(
    ("latent_channels", "parameters"), [(4, 172_097_447), (8, 172_153_003), (16, 172_264_595)]
)
def test_without_matching_the_paper_size_equals_the_plain_six_block_autoencoder(latent_channels, parameters):
    with torch.device("meta"):
        model = NestedAutoencoderKL(latent_channels=latent_channels, ratios=(32,), **PAPER)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("latent_channels", "published"), [(4, 187.45e6), (8, 187.50e6), (16, 187.61e6)])
def test_the_nested_paper_size_is_within_one_and_a_half_percent_of_the_published_one(
    latent_channels, published
):
    with torch.device("meta"):
        model = NestedAutoencoderKL(latent_channels=latent_channels, **PAPER)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.015)


def test_weights_of_a_diffusers_autoencoder_give_diffusers_outputs():
    torch.manual_seed(0)
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    ours = NestedAutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_num_layers=1,
        mid_block_attention_head_dim=32,
        ratios=(8,),
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        expected = theirs.encode(image).latent_dist
        posterior = ours.encode(image, 8).latent_dist
        torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            ours.decode(posterior.mode(), 8).sample,
            theirs.decode(expected.mode()).sample,
            rtol=1e-4,
            atol=1e-4,
        )


def test_the_fingerprint_depends_on_weights_and_config():
    model = tiny()
    before = model.fingerprint()
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-6
    assert model.fingerprint() != before
    assert tiny().fingerprint() == before != tiny(scaling_factor=0.5).fingerprint()


def test_the_fingerprint_is_stable():
    """Stored latents name it, so it may not change; config entries without effect on latents are left out."""
    model = tiny(default_ratio=32, force_upcast=False, latents_mean=(0.0,) * 4, latents_std=(2.0,) * 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    assert model.fingerprint() == "d2b6722c068da029"


def test_latents_fit_every_decoder_of_their_encoder():
    model = tiny()
    decoder = tiny(latents_of=model.fingerprint())
    with torch.no_grad():
        decoder.decoder.conv_out.bias[0] += 1
    assert decoder.latents_fingerprint() == model.latents_fingerprint() == model.fingerprint()
    assert decoder.fingerprint() != model.fingerprint()


def test_initial_logvar_makes_the_untrained_posterior_narrow():
    posterior = tiny(initial_logvar=-6.0).encode(torch.zeros(1, 3, 64, 64), 8).latent_dist
    assert posterior.logvar.detach().mean().item() == pytest.approx(-6, abs=1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratios": (64,)}, "powers of two from 2 to 32"),
        ({"ratios": (12,)}, "powers of two"),
        ({"ratios": ()}, "at least one"),
        ({"norm_num_groups": 3}, "not divisible"),
        ({"mid_block_attention_head_dim": 5}, "not divisible"),
    ],
)
def test_an_impossible_shape_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_an_unavailable_ratio_or_side_is_refused():
    model = tiny(ratios=(8, 16))
    with pytest.raises(ValueError, match=r"ratio 32 is not available.*8, 16"):
        model.encode(torch.rand(1, 3, 64, 64), 32)
    with pytest.raises(ValueError, match="multiples of the ratio 16"):
        model.encode(torch.rand(1, 3, 64, 72), 16)


def smooth_images(side):
    across = torch.linspace(0, 1, side)
    y, x = torch.meshgrid(across, across, indexing="ij")
    waves = [
        torch.sin(1.6 * (i + 1) * x + j) * torch.cos((j + 1) * y + i) for i in range(2) for j in range(3)
    ]
    return 0.7 * torch.stack(waves).view(2, 3, side, side)


@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_pyramid_initialisation_makes_a_low_pass_autoencoder(ratio):
    images, errors = smooth_images(256), {}
    inside = slice(2 * ratio, -2 * ratio)  # zero padding darkens the rim of an untrained decoder
    for initialisation in ("pyramid", "default"):
        model = tiny(block_out_channels=(16, 32, 48, 96, 128, 128), initialisation=initialisation).eval()
        with torch.no_grad():
            again = model(images, ratio).sample
        errors[initialisation] = (again - images)[..., inside, inside].square().mean() / images.var()
    assert errors["pyramid"] < 0.02
    assert errors["default"] > 0.5


@pytest.mark.parametrize(
    "widths", [(16, 32, 64, 80, 80, 80), (16, 32, 64, 64, 96, 64), (32, 32, 64, 64, 64, 64)]
)
def test_transform_initialisation_codes_details(widths):
    images, inside = (
        smooth_images(256),
        slice(32, -32),
    )  # zero padding darkens the rim of an untrained decoder
    model = tiny(block_out_channels=widths, latent_channels=16, initialisation="transform").eval()
    with torch.no_grad():
        latents = {f: model.encode(images, f).latent_dist.mode() for f in (8, 16, 32)}
        again = model.decode(latents[8], 8).sample
    assert ((again - images)[..., inside, inside].square().mean() / images.var()) < 0.02
    stripes = torch.cos(torch.arange(128) * torch.pi / 4).expand(1, 3, 128, 128)  # zero mean per token
    with torch.no_grad():
        detail = model.encode(stripes, 8).latent_dist.mode()[0][..., 2:-2, 2:-2].abs().flatten(1).mean(1)
    assert detail[:3].max() < 0.2
    assert detail[3:].max() > 0.3


def test_transform_initialisation_needs_channels_for_its_values():
    with pytest.raises(ValueError, match="block_out_channels of at least 12, and 64"):
        tiny(block_out_channels=(16, 32, 48, 48, 48, 48), latent_channels=16, initialisation="transform")
