"""Image files to a token file and back; errors of single images are collected."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cat_fast.data.files import atomic_write, require_writable
from cat_fast.data.images.io import load_image, tensor_to_image
from cat_fast.dual_token.grid import Grid
from cat_fast.dual_token.token_file import TokenRecord, write_tokens
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.inference.encoding.codec import IMAGE_FORMATS
from cat_fast.inference.encoding.latent_file import unique_keys


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Result for one image file: its record, or an error."""

    file: Path
    record: TokenRecord | None = None
    error: str | None = None


def encode_files(
    files: Sequence[Path],
    out: Path,
    tokenizer: DualTokenizer,
    grid: Grid,
    *,
    on_done: Callable[[Encoded], None] = lambda result: None,
) -> list[Encoded]:
    """Encode image files one at a time and write the codes of all to `out`.

    `out` is written atomically at the end, and left untouched if every image failed.

    Raises:
        UserError: `out` cannot be written, or the grid exceeds the vocabulary.
    """
    if max(grid) > tokenizer.max_side:
        raise UserError(f"grid: expected at most {tokenizer.max_side} tokens per side, got {max(grid)}")
    require_writable(out)
    fingerprint = tokenizer.fingerprint()
    keys = unique_keys([os.fsencode(file.stem).decode("utf-8", "replace") for file in files])
    results = []
    for file, key in zip(files, keys, strict=True):
        try:
            image = load_image(file)
            tokens = tokenizer.encode(image, grid)
        except UserError as error:
            text = str(error) if str(file) in str(error) else f"{file}: {error}"
            results.append(Encoded(file=file, error=text))
        else:
            source = os.fsencode(file.name).decode("utf-8", "replace")
            size = (image.height, image.width)
            record = TokenRecord(key=key, source=source, size=size, tokens=tokens, tokenizer=fingerprint)
            results.append(Encoded(file=file, record=record))
        on_done(results[-1])
    records = [result.record for result in results if result.record]
    if records:
        write_tokens(out, records, tokenizer.vocabulary)
    return results


def decode_guides(
    records: Sequence[TokenRecord],
    out: Path,
    tokenizer: DualTokenizer,
    image_format: str = "png",
    *,
    on_done: Callable[[Path], None] = lambda file: None,
) -> list[Path]:
    """Write the guide of each record to `out`/KEY.`image_format`, atomically; return the files.

    Raises:
        UserError: unknown format, a record without a guide, or a folder that cannot be written.
    """
    if image_format not in IMAGE_FORMATS:
        raise UserError(f"unknown image format {image_format!r}; expected {', '.join(IMAGE_FORMATS)}")
    for record in records:  # nothing is written if one cannot be
        if not record.tokens.guide.numel():
            raise UserError(f"{record.key}: has semantic codes only, and no guide to decode")
    require_writable(out / "image")
    files = []
    for record in records:
        (guide,) = tokenizer.decode_guides([record.tokens])
        file = out / f"{record.key}.{image_format}"
        with atomic_write(file) as part:
            tensor_to_image(guide).save(
                part, format={"jpg": "jpeg"}.get(image_format, image_format), quality=95
            )
        files.append(file)
        on_done(file)
    return files
