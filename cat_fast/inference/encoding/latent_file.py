"""Latent files: one safetensors file with a (c, h, w) float32 tensor per image and metadata in its header.

The header's key "cat_fast.latents" contains JSON: {"version", "tokenizer": fingerprint, "made_with": {...},
"images": {key: {"ratio", "size", "source", "score", "why", "scored_by", "thresholds", "jpeg_thresholds"}}};
see `RatioOrigin` for the last three. Any safetensors reader can read the tensors without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cat_fast.data.files import atomic_write
from cat_fast.data.ratio_origin import Pair, ScoredBy, as_pair
from cat_fast.errors import UserError
from cat_fast.integers import store_integers

_HEADER = "cat_fast.latents"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LatentRecord:
    """Metadata of one latent."""

    ratio: int
    size: int
    """Side in pixels of the square that was encoded."""
    source: str
    """File name of the photograph."""
    score: int | None = None
    why: str = ""
    """Reason for the choice of ratio."""
    scored_by: ScoredBy | None = None
    """Scorer of `score`; this and the next fields are those of `RatioOrigin`."""
    thresholds: Pair | None = None
    jpeg_thresholds: Pair | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> LatentRecord:
        """Return the record in a header.

        Raises:
            ValueError, TypeError: the fields are not those of a record.
        """
        pairs = {name: as_pair(fields.get(name)) for name in ("thresholds", "jpeg_thresholds")}
        return cls(**{**fields, **pairs, "scored_by": ScoredBy.of(fields.get("scored_by"))})

    def __post_init__(self) -> None:
        store_integers(self, "ratio", "size", "score")


@dataclass(frozen=True, kw_only=True)
class LatentFile:
    """Header of a latent file; tensors stay on disk until `load`."""

    path: Path
    tokenizer: str
    """Fingerprint of the tokenizer that encoded the latents."""
    records: Mapping[str, LatentRecord]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path) -> LatentFile:
        """Read the header.

        Raises:
            UserError: the file is missing, damaged, or was not written by `write_latents`.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected latents written by `cat-fast encode`")
        try:
            with safe_open(path, framework="pt") as file:
                header: dict[str, str] = file.metadata() or {}
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged, or not a safetensors file ({error})") from error
        if _HEADER not in header:
            raise UserError(f"{path}: not a latent file; expected latents written by `cat-fast encode`")
        try:
            content: dict[str, Any] = json.loads(header[_HEADER])
            version, tokenizer = content["version"], content["tokenizer"]
            records = {key: LatentRecord.of(record) for key, record in content["images"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: the header is damaged ({error!r}); encode the images again") from error
        if version != _VERSION:
            raise UserError(
                f"{path}: expected format version {_VERSION}, got version {version}; encode the images again"
            )
        if records.keys() != shapes.keys():
            raise UserError(f"{path}: the header does not match the tensors; encode the images again")
        return cls(path=path, tokenizer=tokenizer, records=records, shapes=shapes)

    def load(self, key: str) -> Tensor:
        """Load the latent `key`, (c, h, w) float32 on the CPU."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(key)


def unique_keys(keys: Sequence[str]) -> list[str]:
    """Make keys unique by appending a number: the second "cat" becomes "cat-2"."""
    taken = {"__metadata__"}  # reserved by safetensors
    numbers: dict[str, int] = {}  # last one tried per key; smaller ones stay taken
    unique = []
    for key in keys:
        name, number = key, numbers.get(key, 1)
        while name in taken:
            number += 1
            name = f"{key}-{number}"
        numbers[key] = number
        taken.add(name)
        unique.append(name)
    return unique


def write_latents(
    path: Path,
    latents: Mapping[str, Tensor],
    records: Mapping[str, LatentRecord],
    *,
    tokenizer: str,
    made_with: Mapping[str, Any],
) -> None:
    """Write latents (c, h, w) and their records atomically.

    Args:
        tokenizer: its fingerprint.
        made_with: device, dtype, versions and backends (`describe_execution`).

    Raises:
        UserError: `path` cannot be written.
    """
    images = {key: asdict(record) for key, record in records.items()}
    header = json.dumps(
        {"version": _VERSION, "tokenizer": tokenizer, "made_with": made_with, "images": images}
    )
    tensors = {key: latent.float().cpu().contiguous() for key, latent in latents.items()}
    with atomic_write(path) as part:
        try:
            save_file(tensors, part, metadata={_HEADER: header})
        except SafetensorError as error:  # raised for a full disk
            raise UserError(f"{path}: cannot be written ({error})") from error
