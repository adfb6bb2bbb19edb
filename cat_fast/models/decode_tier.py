"""Tiers of decoding: `exact` runs the decoder operator by operator, `fast` compiles it, after a self-test.

A compiled decoder fuses operators, so its images differ in the last bits. The self-test decodes a random
latent of each ratio both ways.
"""

import logging
import math
from itertools import product

import torch

from cat_fast.errors import UserError, first_line
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.pipeline_config import upcast

TIERS = ("exact", "fast")
MIN_PSNR = 60.0
"""Least agreement of `fast` with `exact`, in dB of images in [-1, 1]."""
_COUNTS = (1, 2)
"""Numbers of images of the self-test; one image and several are compiled apart."""
_LOG = logging.getLogger("cat_fast.models")


def use_decode_tier(tokenizer: NestedAutoencoderKL, tier: str, side: int | None = None) -> str:
    """Decode in a tier from now on, and return the tier in use.

    `fast` compiles for each ratio, which takes from seconds to minutes. If that fails, if the tokenizer is
    offloaded, or if the images do not agree with those of `exact`, a warning is logged and `exact` is used.

    Args:
        side: side of the images to decode, in pixels; the config's `sample_size` if None. The decoder may
            compile again for much smaller or larger ones.

    Raises:
        UserError: the tier is unknown.
    """
    check_tier(tier)
    tokenizer.decoder._compiled_call_impl = None
    if tier == "fast":
        try:
            reason = _compile(tokenizer, side or tokenizer.config["sample_size"])
        except Exception as error:  # a compiler has many
            reason = f"the decoder does not compile: {first_line(error)}"
        if reason is not None:
            tokenizer.decoder._compiled_call_impl = None
            _LOG.warning("decoding in the tier exact: %s", reason)
    return decode_tier(tokenizer)


def check_tier(tier: str) -> None:
    """Raise UserError if a tier is unknown."""
    if tier not in TIERS:
        raise UserError(f"--tier {tier}: expected {' or '.join(TIERS)}")


def decode_tier(tokenizer: NestedAutoencoderKL) -> str:
    """Return the tier in which a tokenizer decodes."""
    return "exact" if tokenizer.decoder._compiled_call_impl is None else "fast"


@torch.no_grad()
def _compile(tokenizer: NestedAutoencoderKL, side: int) -> str | None:
    """Compile the decoder and test it; return why it cannot be used, or None."""
    if hasattr(tokenizer, "_hf_hook"):
        return "the tokenizer is offloaded"
    config, generator = tokenizer.config, torch.Generator().manual_seed(0)
    with upcast(tokenizer):
        cases = []
        for ratio, count in product(config["ratios"], _COUNTS):
            height = max(side // ratio, 3)
            # not square: what is compiled for equal sides serves no others
            shape = (count, config["latent_channels"], height, height - 1)
            latents = torch.randn(shape, generator=generator).to(tokenizer.device, tokenizer.dtype)
            cases.append((ratio, latents, tokenizer.decode(latents, ratio).sample))
        tokenizer.decoder.compile(dynamic=True)
        for ratio, latents, expected in cases:
            agreement = _psnr(tokenizer.decode(latents, ratio).sample, expected)
            if not agreement >= MIN_PSNR:
                return (
                    f"at {ratio}x, compiled images differ by {agreement:.1f} dB,"
                    f" expected {MIN_PSNR:g} or more"
                )
    return None


def _psnr(images: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of images in [-1, 1], in dB; NaN if one has a NaN."""
    difference = images.double().clamp(-1, 1) - expected.double().clamp(-1, 1)
    error = difference.square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)
