"""Encoding of image files to a token file; errors of single images are collected.

Rows are kept in a file next to the token file, `.NAME.rows`, until all images are done. A killed run resumes
from it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_fast.data.files import require_writable
from cat_fast.data.images.io import load_image
from cat_fast.data.input_samples import file_stamp
from cat_fast.data.row_file import RowFile
from cat_fast.dual_token.grid import Grid
from cat_fast.dual_token.token_file import TokenRecord, from_row, to_row, write_tokens
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.inference.encoding.latent_file import unique_keys
from cat_fast.models.execution import execution_settings


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

    `out` is written atomically at the end, and left untouched if every image failed. Images that an
    interrupted call with the same arguments has encoded are not encoded again, unless a file has changed.

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
    execution = execution_settings(tokenizer.guide.dtype)
    keys = unique_keys([os.fsencode(file.stem).decode("utf-8", "replace") for file in files])
    rows = _rows_of(out)
    images = _inputs(files, keys, grids)
    known = _known_rows(rows, {"tokenizer": fingerprint, "execution": execution, "images": images})
    results = []
    for file, key, grid in zip(files, keys, grids, strict=True):
        if key in known:
            record = from_row(known[key], 0, tokenizer.vocabulary, fingerprint)
            results.append(Encoded(file=file, record=record))
        else:
            results.append(_encode(file, key, grid, tokenizer, fingerprint))
            if results[-1].record:
                rows.append(to_row(results[-1].record, tokenizer.vocabulary))
        on_done(results[-1])
    records = [result.record for result in results if result.record]
    if records:
        write_tokens(out, records, tokenizer.vocabulary)
    rows.path.unlink(missing_ok=True)
    return results


def interrupted_execution(out: Path) -> dict[str, Any]:
    """Return the `execution_settings` of an interrupted call for `out`; empty if there was none."""
    found = _rows_of(out).read()
    return found[0].get("execution", {}) if found else {}


def _rows_of(out: Path) -> RowFile:
    return RowFile(out.with_name(f".{out.name}.rows"))


def _encode(
    file: Path, key: str, grid: Grid | UserError, tokenizer: DualTokenizer, fingerprint: str
) -> Encoded:
    try:
        if isinstance(grid, UserError):
            raise grid
        image = load_image(file)
        tokens = tokenizer.encode(image, grid)
    except UserError as error:
        text = str(error) if str(file) in str(error) else f"{file}: {error}"
        return Encoded(file=file, error=text)
    source = os.fsencode(file.name).decode("utf-8", "replace")
    size = (image.height, image.width)
    record = TokenRecord(key=key, source=source, size=size, tokens=tokens, tokenizer=fingerprint)
    return Encoded(file=file, record=record)


def _inputs(files: Sequence[Path], keys: Sequence[str], grids: Sequence[Grid | UserError]) -> list[list[Any]]:
    """Return what the codes of each image depend on, as JSON values."""
    return [
        [key, *file_stamp(str(file)), None if isinstance(grid, UserError) else list(grid)]
        for file, key, grid in zip(files, keys, grids, strict=True)
    ]


def _known_rows(rows: RowFile, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of an interrupted call by key; the file of a call with other arguments is removed."""
    found = rows.read()
    if found and found[0] == identity:
        return {row["key"]: row for row in found[1:]}
    rows.path.unlink(missing_ok=True)
    rows.append(identity)
    return {}
