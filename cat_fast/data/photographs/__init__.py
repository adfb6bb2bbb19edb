"""The freely licensed photographs that ship with cat_fast, with captions and perception flags.

ATTRIBUTION.md in this folder names source, author and licence of each.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

CATEGORIES = ("landscape", "sky", "face", "text", "texture", "object")
SPLITS = ("train", "held_out")


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """One RGB JPEG, short side 360..640 px, and what a captioner would say about it."""

    key: str
    path: Path
    caption: str
    has_text: bool
    """Writing that a viewer would read or notice; not a name tag of a few pixels."""
    has_faces: bool
    """Human faces, also in profile; not those of animals."""
    category: str
    """One of CATEGORIES."""
    split: str
    """"train" or "held_out"; held-out photographs are never trained on."""


def photographs(split: str | None = None) -> list[Photograph]:
    """Return the photographs of one split ("train" or "held_out"), or all of them, ordered by key.

    Raises:
        ValueError: the split is neither.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}, or None")
    folder = resources.files(__name__)
    lines = folder.joinpath("photographs.jsonl").read_text(encoding="utf-8").splitlines()
    records = sorted((json.loads(line) for line in lines), key=lambda record: record["key"])
    # The wheel is never imported from a zip file (it holds compiled code), so that the folder is a real path.
    return [
        _photograph(record, Path(str(folder)))
        for record in records
        if split is None or record["split"] == split
    ]


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
