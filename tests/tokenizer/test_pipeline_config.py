"""Config entries that pipelines apply: the scale of latents and upcasting, as in diffusers' pipelines."""

import pytest
import torch
from diffusers import AutoencoderKL

from cat_fast import NestedAutoencoderKL
from cat_fast.errors import UserError
from cat_fast.inference.encoding.ratio_batches import encode_batch
from cat_fast.tokenizer.pipeline_config import latent_scale, upcast
from tests.tokenizer.test_autoencoder import tiny

MEAN, STD = (0.0, 0.5, -1.0, 2.0), (1.0, 2.0, 0.5, 4.0)


def diffusers_scaled(latent, config):
    """Scale latents as diffusers' Stable Diffusion 3 pipeline, or with statistics that of XL."""
    if config["latents_mean"] is not None:
        mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        return (latent - mean) * config["scaling_factor"] / std
    return (latent - config["shift_factor"]) * config["scaling_factor"]


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"scaling_factor": 0.18215},
        {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5},
    ],
)
def test_the_scale_of_latents_is_that_of_diffusers(entries):
    vae = tiny(**entries)
    scale = latent_scale(vae)
    latent = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(scale.apply(latent, 16), diffusers_scaled(latent, vae.config))
    torch.testing.assert_close(scale.undo(scale.apply(latent, 16), 16), latent)
    assert (scale.to_json() is None) == (not entries)


def test_a_published_autoencoder_keeps_its_scale(tmp_path):
    theirs = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        scaling_factor=0.5, latents_mean=list(MEAN), latents_std=list(STD), force_upcast=False,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = NestedAutoencoderKL.from_pretrained(tmp_path)
    assert latent_scale(ours).shift_factor == list(MEAN)
    assert latent_scale(ours).scaling_factor == [0.5, 0.25, 1.0, 0.125]
    assert not ours.config.force_upcast


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"latents_mean": MEAN}, "both latents_mean and latents_std, or neither"),
        ({"latents_std": STD}, "both latents_mean and latents_std, or neither"),
        (
            {"latents_mean": MEAN, "latents_std": (1.0, 0.0, 1.0, 1.0)},
            "latents_std: expected positive values",
        ),
        (
            {"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1},
            "shift_factor or latents_mean, got both",
        ),
        ({"scaling_factor": 0.0}, "scaling_factor: expected positive values"),
    ],
)
def test_contradictory_entries_are_refused(entries, message):
    with pytest.raises(UserError, match=message):
        latent_scale(tiny(**entries))


@pytest.mark.parametrize(
    ("dtype", "force", "expected"),
    [
        (torch.float16, True, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, True, torch.float32),
    ],
)
def test_only_float16_is_upcast_and_only_where_the_config_asks_for_it(dtype, force, expected):
    vae = tiny(force_upcast=force).to(dtype)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with upcast(vae):
        assert vae.dtype == expected
    assert vae.dtype == dtype
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_images_that_overflow_float16_are_encoded_in_float32():
    vae = tiny().eval()
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(3e3)
    pixels = [torch.full((3, 32, 32), 255, dtype=torch.uint8)]
    (expected,) = encode_batch(vae, pixels, 16)
    (found,) = encode_batch(vae.half(), pixels, 16)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    vae.register_to_config(force_upcast=False)
    assert not torch.isfinite(encode_batch(vae, pixels, 16)[0]).all()
