"""Generation of token records from captions, by a language model and its tokenizer."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cat_fast.dual_token.language.model import DualLanguageModel
from cat_fast.dual_token.language.sampling import sample
from cat_fast.dual_token.semantic.text_target import TextTarget
from cat_fast.dual_token.token_file import TokenRecord
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError, first_line


def check_fit(model: DualLanguageModel, tokenizer: DualTokenizer, target: TextTarget) -> None:
    """Check that a language model was trained with a tokenizer and a text encoder.

    Raises:
        UserError: it was trained with others.
    """
    for what, trained, own in (
        ("tokenizer", model.config["tokenizer_fingerprint"], tokenizer.fingerprint()),
        ("text encoder", model.config["text_fingerprint"], target.fingerprint()),
    ):
        if trained not in (None, own):
            raise UserError(
                f"the language model was trained with {what} {trained}, got {own}; use that of its training"
            )


def generate_records(
    model: DualLanguageModel,
    tokenizer: DualTokenizer,
    target: TextTarget,
    captions: Sequence[str],
    *,
    seed: int = 0,
    grids: Sequence[tuple[int, int]] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    on_token: Callable[[], Any] = lambda: None,
) -> Iterator[TokenRecord]:
    """Yield a record per caption, named after its number; image i has the seed `seed` + i."""
    vocabulary, fingerprint = tokenizer.vocabulary, tokenizer.fingerprint()
    digits = max(4, len(str(len(captions) - 1)))
    for number, caption in enumerate(captions):
        (text,) = target.states([caption])
        ids = sample(
            model,
            vocabulary,
            text,
            seed + number,
            grids=grids,
            temperature=temperature,
            top_k=top_k,
            on_token=on_token,
        )
        yield TokenRecord(
            key=f"{number:0{digits}}",
            source=caption,
            size=(0, 0),
            tokens=vocabulary.parse(ids),
            tokenizer=fingerprint,
        )


def read_captions(path: Path) -> list[str]:
    """Return the captions of a text file, one per line, or of JSON lines with a `caption` each.

    Raises:
        UserError: the file cannot be read, or has no captions.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); expected captions") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)["caption"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: line {number}: expected a caption ({first_line(error)})") from error
        if not isinstance(line, str) or not line.strip():
            raise UserError(f"{path}: line {number}: expected a caption, got {line!r}")
        found.append(line)
    if not found:
        raise UserError(f"{path}: contains no captions")
    return found
