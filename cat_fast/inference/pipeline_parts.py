"""Whether the parts of a pipeline belong together."""

from collections.abc import Sequence

from cat_fast.complexity import Description
from cat_fast.errors import UserError
from cat_fast.generator import DiT
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
            f"labels, got {len(labels)}"
        )
    if descriptions is not None and len(descriptions) != len(labels):
        raise UserError(f"expected one description a label, {len(labels)} in all, got {len(descriptions)}")


def load_text_encoder(name: str | None, generator: DiT) -> TextEncoder | None:
    """The encoder of a generator with text; raises UserError where `name` cannot be its encoder."""
    width = generator.config.text_dim
    if name is None and width is None:
        return None
    if name is None:
        raise UserError("the generator was trained with text: text_encoder must name its text encoder")
    if width is None:
        raise UserError(
            f"the generator was trained without text, and text encoder {name!r} is of no use to it"
        )
    encoder = TextEncoder(name)
    if encoder.dim != width:
        raise UserError(
            f"text encoder {name!r} gives tokens of width {encoder.dim}, the generator was trained on {width}"
        )
    return encoder
