"""Format of a latent folder.

    latents.json                 tokenizer fingerprint and scale, resolution, class names; written once
    shard-00000.safetensors      latents of one shard by key; or, for webdataset readers,
    shard-00000.tar              KEY.npy, KEY.cls and KEY.json per latent
    shard-00000.json             key, label, ratio, shape, caption per latent; size, SHA-256,
                                 moments by ratio, origins of the ratios

The JSON file next to a shard is its commit record, written after the shard is on disk. A shard without a
record, or with another size, does not count: its latents are encoded again, so no latent is stored twice.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_fast.data.folder_settings import claim_folder, require_same_settings
from cat_fast.errors import UserError
from cat_fast.integers import store_integers

HEADER = "latents.json"
SCALE = "scale"
"""Header field with the tokenizer's own scale (`LatentScale.to_json`); missing in earlier versions."""
MOMENTS = "moments_by_ratio"
"""Record field with the moments of the latents of each ratio; missing in folders of earlier versions."""
SUFFIXES = {"safetensors": ".safetensors", "webdataset": ".tar"}
"""File extension by shard format."""


@dataclass(frozen=True, kw_only=True)
class LatentEntry:
    """Metadata of a latent."""

    key: str
    label: int
    ratio: int
    shape: tuple[int, int, int]
    """(c, h, w)."""
    caption: str | None = None

    def __post_init__(self) -> None:
        store_integers(self, "label", "ratio")


def claim_latents(folder: Path, settings: Mapping[str, Any]) -> None:
    """Claim a folder for latents made with `settings`, which become its header.

    Raises:
        UserError: the folder contains latents made with other settings.
    """
    claim_folder(folder / HEADER, settings, "latents")


def require_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check settings against the header of a folder, if it has one; other entries of the header are ignored.

    Raises:
        UserError: the folder contains latents made with other settings.
    """
    require_same_settings(folder / HEADER, settings, "latents")


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the commit records of a folder, in shard order."""
    return (read_json(path) for path in sorted(folder.glob("shard-*.json")))


def damage(folder: Path, record: Mapping[str, Any]) -> str | None:
    """Return the problem of a recorded shard, or None; only existence and size are checked."""
    path = folder / record["shard"]
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != record["bytes"]:
        return f"is damaged: {path.stat().st_size} of {record['bytes']} bytes"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a latent folder.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and encode again") from error
