"""Whether the parts of a pipeline belong together, and whether it has room for what is asked of it."""

from collections.abc import Sequence

from cat_fast.complexity import Description
from cat_fast.errors import UserError
from cat_fast.generator import DiT, SampleRequest
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.tokenizer import NestedAutoencoderKL


def require_fitting(
    tokenizer: NestedAutoencoderKL,
    generator: DiT,
    labels: Sequence[str],
    descriptions: Sequence[Description] | None,
) -> None:
    """Raises UserError where parts were not made for each other."""
    trained_on = generator.config.tokenizer_fingerprint
    if trained_on is not None and trained_on != tokenizer.fingerprint():
        raise UserError(
            f"the generator was trained on latents of tokenizer {trained_on}, this one is "
            f"{tokenizer.fingerprint()}; use the tokenizer it was trained with"
        )
    if len(labels) != generator.config.num_classes or len(set(labels)) != len(labels):
        raise UserError(
            f"the generator has {generator.config.num_classes} classes: expected as many different "
            f"labels, got {len(set(labels))}"
        )
    if descriptions is not None and len(descriptions) != len(labels):
        raise UserError(f"expected one description a label, {len(labels)} in all, got {len(descriptions)}")


def load_text_encoder(name: str | None, generator: DiT, fingerprint: str | None = None) -> TextEncoder | None:
    """The encoder of a generator with text.

    Args:
        fingerprint: of the encoder that it was trained with, where the generator itself does not know it.

    Raises:
        UserError: `name` cannot be its encoder, or is known to be another one.
    """
    width = generator.config.text_dim
    if name is None and width is None:
        return None
    if name is None:
        raise UserError(
            "the generator was trained with text: text_encoder must name its text encoder (--text-encoder)"
        )
    if width is None:
        raise UserError(
            f"the generator was trained without text, and text encoder {name!r} is of no use to it"
        )
    encoder = TextEncoder(name)
    if encoder.dim != width:
        raise UserError(
            f"text encoder {name!r} gives tokens of width {encoder.dim}, the generator was trained on {width}"
        )
    trained_with = generator.config.text_encoder_fingerprint or fingerprint
    if trained_with is not None and trained_with != encoder.fingerprint():
        raise UserError(
            f"the generator was trained with text encoder {trained_with}, {name!r} is "
            f"{encoder.fingerprint()}; use the text encoder it was trained with"
        )
    return encoder


def require_room(requests: Sequence[SampleRequest], twins: int, max_tokens: int) -> None:
    """Raises UserError where a picture, with its unconditional twin if `twins` is 2, is over `max_tokens`."""
    longest = max(range(len(requests)), key=lambda i: requests[i].num_tokens, default=None)
    if longest is None:
        return
    request = requests[longest]
    needed = twins * request.num_tokens
    if needed > max_tokens:
        guided = f", {needed} with the unconditional twin that guidance takes," if twins == 2 else ""
        raise UserError(
            f"max_tokens {max_tokens}: picture {longest} at {request.ratio}x has {request.num_tokens} tokens"
            f"{guided} and has to fit one forward pass; raise --max-tokens to {needed} at least"
        )
