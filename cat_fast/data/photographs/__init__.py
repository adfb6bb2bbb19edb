"""Freely licensed photographs included in the package, with captions and content flags.

ATTRIBUTION.md in this folder lists source, author and licence of each.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

CATEGORIES = ("landscape", "sky", "face", "text", "texture", "object")
SPLITS = ("train", "held_out")


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """An RGB JPEG with a short side of 360 to 640 px, its caption and its content flags."""

    key: str
    path: Path
    caption: str
    has_text: bool
    """Contains legible or noticeable text; a name tag of a few pixels does not count."""
    has_faces: bool
    """Contains human faces, including profiles; animal faces do not count."""
    category: str
    """One of CATEGORIES."""
    split: str
    """"train" or "held_out"; held-out photographs are never trained on."""


def photographs(split: str | None = None) -> list[Photograph]:
    """Return the photographs of one split ("train" or "held_out"), or all of them, ordered by key.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}, or None")
    # The package contains compiled code and is never imported from a zip file, so the folder is a real path.
    folder = Path(str(resources.files(__name__)))
    records = sorted(_records(), key=lambda record: record["key"])
    return [_photograph(record, folder) for record in records if split is None or record["split"] == split]


@cache
def debian_files() -> frozenset[str]:
    """Return the files of Debian packages that photographs were made from, by path in the package."""
    sources = (record["source"] for record in _records())
    return frozenset(source["file"] for source in sources if source["kind"] == "debian")


def _records() -> Iterator[dict[str, Any]]:
    text = resources.files(__name__).joinpath("photographs.jsonl").read_text(encoding="utf-8")
    return map(json.loads, text.splitlines())


def _photograph(record: Mapping[str, Any], folder: Path) -> Photograph:
    return Photograph(
        key=record["key"],
        path=folder / record["file"],
        caption=record["caption"],
        has_text=record["has_text"],
        has_faces=record["has_faces"],
        category=record["category"],
        split=record["split"],
    )
