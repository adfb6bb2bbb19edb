"""Image files to a token file and back; errors of single images are collected."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cat_fast.data.files import atomic_write, require_writable
from cat_fast.data.images.io import load_image, tensor_to_image
from cat_fast.dual_token.grid import Grid
from cat_fast.dual_token.rerender.backend import Size
from cat_fast.dual_token.rerender.rerender import RerenderSettings
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
    grids: Sequence[Grid | UserError],
    *,
    on_done: Callable[[Encoded], None] = lambda result: None,
) -> list[Encoded]:
    """Encode image files one at a time and write the codes of all to `out`.

    `out` is written atomically at the end, and left untouched if every image failed.

    Args:
        grids: grid of each image, or why it has none, which is then its result.

    Raises:
        UserError: `out` cannot be written, or a grid exceeds the vocabulary.
    """
    largest = max((max(grid) for grid in grids if not isinstance(grid, UserError)), default=0)
    if largest > tokenizer.max_side:
        raise UserError(f"grid: expected at most {tokenizer.max_side} tokens per side, got {largest}")
    require_writable(out)
    fingerprint = tokenizer.fingerprint()
    keys = unique_keys([os.fsencode(file.stem).decode("utf-8", "replace") for file in files])
    results = []
    for file, key, grid in zip(files, keys, grids, strict=True):
        try:
            if isinstance(grid, UserError):
                raise grid
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
    _require_format(image_format)
    for record in records:  # nothing is written if one cannot be
        if not record.tokens.guide.numel():
            raise UserError(f"{record.key}: has semantic codes only, and no guide to decode")
    require_writable(out / "image")
    return [
        _save(tokenizer.decode_guides([record.tokens])[0], record, out, image_format, on_done)
        for record in records
    ]


def decode_images(
    records: Sequence[TokenRecord],
    out: Path,
    tokenizer: DualTokenizer,
    image_format: str = "png",
    *,
    size: Size | None = None,
    settings: RerenderSettings | None = None,
    seed: int = 0,
    on_step: Callable[[], Any] = lambda: None,
    on_done: Callable[[Path], None] = lambda file: None,
) -> list[Path]:
    """Re-render each record to `out`/KEY.`image_format`, one at a time; return the files.

    An image's noise depends on `seed` and its key, not on the other images.

    Args:
        size, settings: see `DualTokenizer.decode_batch`.

    Raises:
        UserError: unknown format, a record that lacks what the mode needs, a size that the diffusion model
            cannot draw, or a folder that cannot be written.
    """
    _require_format(image_format)
    settings = settings or RerenderSettings()
    backend = tokenizer.backend
    backend.check_size(size or backend.default_size)
    for record in records:
        if settings.mode != "semantic" and not record.tokens.guide.numel():
            raise UserError(f"{record.key}: has no guide; use the mode semantic, or remove it")
        if settings.mode in ("full", "semantic") and not record.tokens.semantic.numel():
            raise UserError(f"{record.key}: has no semantic codes; use the mode unconditioned, or remove it")
    require_writable(out / "image")
    files = []
    for record in records:
        seeds = [_seed_of(seed, record.key)]
        (image,) = tokenizer.decode_batch([record.tokens], size, settings, seeds, on_step)
        files.append(_save(image, record, out, image_format, on_done))
    return files


def _seed_of(seed: int, key: str) -> int:
    digest = hashlib.blake2b(f"{seed} {key}".encode(errors="surrogatepass"), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _require_format(image_format: str) -> None:
    if image_format not in IMAGE_FORMATS:
        raise UserError(f"unknown image format {image_format!r}; expected {', '.join(IMAGE_FORMATS)}")


def _save(
    image: Tensor, record: TokenRecord, out: Path, image_format: str, on_done: Callable[[Path], None]
) -> Path:
    file = out / f"{record.key}.{image_format}"
    with atomic_write(file) as part:
        tensor_to_image(image).save(part, format={"jpg": "jpeg"}.get(image_format, image_format), quality=95)
    on_done(file)
    return file
