"""Token files: JSON lines, one image per line, readable by any program.

    {"key": "cat", "source": "cat.jpg", "size": [480, 640], "semantic": [...], "guide": [[...], ...],
     "ids": [...], "tokenizer": "0123456789abcdef"}

`size` is height and width of the original in pixels, `ids` the flat sequence.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cat_fast.data.files import atomic_write
from cat_fast.dual_token.sequence import Vocabulary
from cat_fast.dual_token.tokens import DualTokens
from cat_fast.errors import UserError, first_line


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """The codes of one image and their origin."""

    key: str
    """Unique name in the file."""
    source: str
    """File name of the image."""
    size: tuple[int, int]
    """Height and width of the image in pixels."""
    tokens: DualTokens
    tokenizer: str
    """Fingerprint of the tokenizer."""


def write_tokens(path: Path, records: Iterable[TokenRecord], vocabulary: Vocabulary) -> None:
    """Write a token file, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for record in records:
            file.write(json.dumps(to_row(record, vocabulary)) + "\n")


def to_row(record: TokenRecord, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the JSON object of a line."""
    return {
        "key": record.key,
        "source": record.source,
        "size": list(record.size),
        "semantic": record.tokens.semantic.tolist(),
        "guide": record.tokens.guide.tolist(),
        "ids": vocabulary.flatten(record.tokens),
        "tokenizer": record.tokenizer,
    }


def read_tokens(path: Path, vocabulary: Vocabulary, tokenizer: str | None) -> list[TokenRecord]:
    """Read a token file, checked from the first line to the last.

    A line needs `ids`, such as the output of a language model, or `guide` and `semantic`; the other entries
    are optional.

    Args:
        vocabulary: that of the tokenizer that will decode the file.
        tokenizer: fingerprint of that tokenizer; None accepts the codes of any.

    Raises:
        UserError: the file is missing or empty, a line is not valid or has codes that the vocabulary does not
            contain, another tokenizer wrote it, or a key occurs twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # U+2028 and the like are part of a line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a token file of `cat-fast dual encode`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); expected a token file") from error
    found: dict[str, TokenRecord] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = from_row(json.loads(line), number, vocabulary, tokenizer)
        except UserError as error:
            raise UserError(f"{path}: line {number}: {error}") from error
        except ValueError as error:
            raise UserError(f"{path}: line {number}: not valid JSON ({first_line(error)})") from error
        if record.key in found:
            raise UserError(f"{path}: line {number}: the key {record.key!r} occurs twice")
        found[record.key] = record
    if not found:
        raise UserError(f"{path}: contains no codes")
    return list(found.values())


def from_row(row: Any, number: int, vocabulary: Vocabulary, tokenizer: str | None) -> TokenRecord:
    """Return the record of a line.

    Args:
        number: of the line, which names a record without a key.
        vocabulary, tokenizer: see `read_tokens`.

    Raises:
        UserError: the line is not valid, has codes outside the vocabulary, or is of another tokenizer.
    """
    if not isinstance(row, dict):
        raise UserError(f"expected an object, got {type(row).__name__}")
    written = row.get("tokenizer")
    if tokenizer is not None and written not in (None, tokenizer):
        raise UserError(
            f"encoded by tokenizer {written}, but the checkpoint is {tokenizer}; use the checkpoint that"
            " encoded it, or pass --force to decode anyway"
        )
    key = row.get("key", f"line{number}")
    if not isinstance(key, str) or not key or "/" in key or "\0" in key or key in (".", ".."):
        raise UserError(f"key: expected a file name without folders, got {key!r}")
    size = row.get("size", [0, 0])
    if not _integers(size) or len(size) != 2 or min(size) < 0:
        raise UserError(f"size: expected height and width in pixels, got {size!r}")
    return TokenRecord(
        key=key,
        source=str(row.get("source", key)),
        size=(size[0], size[1]),
        tokens=_tokens(row, vocabulary),
        tokenizer=str(written or ""),
    )


def _tokens(row: dict[str, Any], vocabulary: Vocabulary) -> DualTokens:
    """Return the codes of a line; `ids` and codes must agree if it has both."""
    ids, guide, semantic = row.get("ids"), row.get("guide"), row.get("semantic", [])
    if ids is None and guide is None:
        raise UserError("expected ids, or guide and semantic codes")
    if ids is not None and not _integers(ids):
        raise UserError("ids: expected a list of integers")
    parsed = None if ids is None else vocabulary.parse(ids)
    if guide is None:
        assert parsed is not None
        return parsed
    if not _integers(semantic):
        raise UserError("semantic: expected a list of integers")
    if not isinstance(guide, list) or not all(map(_integers, guide)) or len({len(r) for r in guide}) > 1:
        raise UserError("guide: expected rows of equal length, lists of integers")
    grid = (len(guide), len(guide[0]) if guide else 0)
    tokens = DualTokens(
        torch.tensor(semantic, dtype=torch.int64),
        torch.tensor(guide, dtype=torch.int64).view(grid),
    )
    vocabulary.check(tokens)
    if parsed is not None and parsed != tokens:
        raise UserError("ids and codes differ: remove one of them")
    return tokens


def _integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and abs(value) < 2**62 for value in values)
