"""Components of `CATPipeline`: their classes, and checks that they were trained together."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.tokenizer import NestedAutoencoderKL

COMPONENTS: dict[str, tuple[type, ...]] = {
    "vae": (NestedAutoencoderKL,),
    "transformer": (DiT,),
    "scheduler": (
        DDPMScheduler,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
    ),
    "text_encoder": (TextEncoder,),
}
"""Components of a pipeline with the classes that each may have."""
OPTIONAL = ("text_encoder",)


def check_classes(parts: Mapping[str, Any]) -> None:
    """Check the classes of components, given by name.

    Raises:
        UserError: a component is of a class that the pipeline cannot use.
    """
    for name, part in parts.items():
        if part is None and name in OPTIONAL:
            continue
        if not isinstance(getattr(part, "_orig_mod", part), COMPONENTS[name]):  # torch.compile wraps modules
            raise UserError(f"{name}: expected a {class_names(name)}, got a {type(part).__name__}")


def check_fit(vae: NestedAutoencoderKL, transformer: DiT, text_encoder: TextEncoder | None) -> None:
    """Check that components were trained together.

    Raises:
        UserError: the transformer was trained with another tokenizer or text encoder.
    """
    config = transformer.config
    if config.tokenizer_fingerprint is not None:
        found = vae.latents_fingerprint()
        if found != config.tokenizer_fingerprint and not _is_rounded(vae):
            raise UserError(
                f"the transformer was trained on latents of tokenizer {config.tokenizer_fingerprint}, this"
                f" one is {found}; use the tokenizer it was trained with"
            )
    if text_encoder is None and config.text_dim is None:
        return
    if text_encoder is None:
        raise UserError("the transformer was trained with text: its text_encoder is missing (--text-encoder)")
    if config.text_dim is None:
        raise UserError(
            f"the transformer was trained without text and cannot use text encoder {text_encoder.name!r}"
        )
    if text_encoder.dim != config.text_dim:
        raise UserError(
            f"text encoder {text_encoder.name!r} has tokens of width {text_encoder.dim}, the transformer was"
            f" trained with width {config.text_dim}"
        )
    if config.text_encoder_fingerprint not in (None, text_encoder.fingerprint()):
        raise UserError(
            f"the transformer was trained with text encoder {config.text_encoder_fingerprint},"
            f" {text_encoder.name!r} is {text_encoder.fingerprint()}; use the text encoder it was trained"
            " with"
        )


def _is_rounded(model: torch.nn.Module) -> bool:
    """Check whether all weights fit 16 bits: a copy in lower precision, with another fingerprint."""
    return any(
        all(torch.equal(weight, weight.to(dtype).to(weight.dtype)) for weight in model.parameters())
        for dtype in (torch.bfloat16, torch.float16)
    )


def class_names(part: str) -> str:
    """Return the names of the classes that a component may have, for messages."""
    return " or ".join(kind.__name__ for kind in COMPONENTS[part])
