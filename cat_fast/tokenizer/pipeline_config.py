"""Config entries of an autoencoder that pipelines apply, as in diffusers: scale of latents, and upcasting."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cat_fast.data.latents.scale import LatentScale
from cat_fast.errors import UserError
from cat_fast.tokenizer.autoencoder import NestedAutoencoderKL


def latent_scale(vae: NestedAutoencoderKL) -> LatentScale:
    """Return the scale in which a diffusion model sees the latents, per channel, as in diffusers' pipelines.

    It is (latent - shift_factor) * scaling_factor, or, for a config with `latents_mean` and `latents_std`,
    (latent - latents_mean) * scaling_factor / latents_std.

    Raises:
        UserError: only one of `latents_mean` and `latents_std`, a shift besides them, or a scale that is not
            positive.
    """
    config, channels = vae.config, vae.config["latent_channels"]
    shift, scale = [config["shift_factor"]] * channels, [config["scaling_factor"]] * channels
    mean, std = config["latents_mean"], config["latents_std"]
    if (mean is None) != (std is None):
        raise UserError("tokenizer config: expected both latents_mean and latents_std, or neither")
    if mean is not None and std is not None:
        if config["shift_factor"]:
            raise UserError("tokenizer config: expected shift_factor or latents_mean, got both")
        if min(std) <= 0:
            raise UserError(f"tokenizer config: latents_std: expected positive values, got {list(std)}")
        shift, scale = list(mean), [factor / one for factor, one in zip(scale, std, strict=True)]
    found = LatentScale([*map(float, shift)], [*map(float, scale)])
    found.check(config["ratios"], channels)
    return found


@contextmanager
def upcast(vae: NestedAutoencoderKL) -> Iterator[None]:
    """Run an autoencoder of float16 weights in float32 if its config asks for it (`force_upcast`).

    Its weights are float16 again afterwards, with the same values.
    """
    if vae.dtype != torch.float16 or not vae.config["force_upcast"]:
        yield
        return
    module: Any = vae  # diffusers' wrapper of `to` hides its arguments
    module.to(torch.float32)
    try:
        yield
    finally:
        module.to(torch.float16)
