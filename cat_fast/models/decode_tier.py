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
_SIDES = (8, 6)
"""Height and width of the self-test's latents; what is compiled for equal sides serves no others."""
_COUNTS = (1, 2)
"""Numbers of images of the self-test; one image and several are compiled apart."""
_LOG = logging.getLogger("cat_fast.models")


def use_decode_tier(tokenizer: NestedAutoencoderKL, tier: str) -> str:
    """Decode in a tier from now on, and return the tier in use.

    `fast` compiles for each ratio, which takes from seconds to minutes. If that fails, if the tokenizer is
    offloaded, or if the images do not agree with those of `exact`, a warning is logged and `exact` is used.

    Raises:
        UserError: the tier is unknown.
    """
    check_tier(tier)
    tokenizer.decoder._compiled_call_impl = None
    if tier == "fast":
        try:
            reason = "the tokenizer is offloaded" if hasattr(tokenizer, "_hf_hook") else _compile(tokenizer)
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
def _compile(tokenizer: NestedAutoencoderKL) -> str | None:
    """Compile the decoder; return how its images differ from those of `exact` by too much, or None."""
    shape = (max(_COUNTS), tokenizer.config["latent_channels"], *_SIDES)
    random = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    cases = list(product(tokenizer.config["ratios"], _COUNTS))
    with upcast(tokenizer):
        latents = random.to(tokenizer.device, tokenizer.dtype)
        exact = [tokenizer.decode(latents[:count], ratio).sample for ratio, count in cases]
        tokenizer.decoder.compile(dynamic=True)
        for (ratio, count), expected in zip(cases, exact, strict=True):
            agreement = _psnr(tokenizer.decode(latents[:count], ratio).sample, expected)
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
