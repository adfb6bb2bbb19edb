"""The packaged captions with ratings on the published scale; see PROVENANCE.md next to them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cat_fast.complexity.captions import describe, read_rows
from cat_fast.complexity.description import Description
from cat_fast.data.images.label_fields import SCORES
from cat_fast.errors import UserError

RATED_CAPTIONS = Path(__file__).parent / "assets" / "rated"
"""Folder of the packaged files, one per source."""

_ID_FIELDS = {"coco_id": "coco", "file": "photograph", "class": "class"}
"""Fields that identify the image of a caption, and the kind of image."""


@dataclass(frozen=True)
class RatedCaption:
    """A description with the independent ratings that it was given."""

    description: Description
    ratings: tuple[int, ...]
    """Ratings 1..9 by the published prompt, one or more."""
    source: str
    """Name of the file without its endings, such as "coco"."""
    image: str = ""
    """Identity of the described image, such as "coco:504559"; empty for captions without an image."""
    domain: str = ""
    """Kind of image, where the source distinguishes kinds."""

    @property
    def mean(self) -> float:
        """Mean rating, not rounded: the target of distillation and the truth in evaluation."""
        return sum(self.ratings) / len(self.ratings)


def read_rated(paths: Iterable[Path] | None = None) -> list[RatedCaption]:
    """Read rated captions, by default all packaged ones in the order of file names and lines.

    A line is a JSON object with "caption", "scores" (a list of ratings) and optionally "has_text",
    "has_faces", "domain" and one of "coco_id", "file" and "class".

    Raises:
        UserError: a file cannot be read or is empty, or a line is malformed; names the line.
    """
    rated: list[RatedCaption] = []
    for path in sorted(RATED_CAPTIONS.glob("*.jsonl*")) if paths is None else paths:
        before = len(rated)
        source = path.name.partition(".")[0]
        for location, row in read_rows(path):
            ratings = row.get("scores")
            if not isinstance(ratings, list) or not ratings or not all(_is_rating(r) for r in ratings):
                raise UserError(
                    f'{location}: "scores" must be a list of integers from 1 to 9, got {ratings!r}'
                )
            image = next((f"{kind}:{row[name]}" for name, kind in _ID_FIELDS.items() if name in row), "")
            domain = str(row.get("domain", ""))
            rated.append(
                RatedCaption(describe(row, location), tuple(ratings), source, image=image, domain=domain)
            )
        if len(rated) == before:
            raise UserError(f"{path}: the file contains no rated captions; expected one JSON object per line")
    return rated


def assign_folds(rated: Sequence[RatedCaption], folds: int = 5, seed: int = 0) -> np.ndarray:
    """Assign each caption to a fold; captions of one image, or of one text in lower case, share it.

    The groups are shuffled within each source and dealt out in turn, so that every fold holds about the same
    share of each source.

    Returns:
        Fold indices 0..folds-1, int64 (len(rated),).
    """
    groups = _groups(rated)
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    by_source: dict[str, list[list[int]]] = {}
    for indices in members.values():
        by_source.setdefault(rated[indices[0]].source, []).append(indices)
    rng = np.random.default_rng(seed)
    assigned = np.zeros(len(rated), dtype=np.int64)
    for source in sorted(by_source):
        for position, which in enumerate(rng.permutation(len(by_source[source]))):
            assigned[by_source[source][which]] = position % folds
    return assigned


def _groups(rated: Sequence[RatedCaption]) -> list[int]:
    """Return the group of each caption: the connected components of equal images and equal texts."""
    parent = list(range(len(rated)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rated):
        keys = [("text", row.description.caption.lower())] + [("image", row.image)] * bool(row.image)
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    return [root(i) for i in range(len(rated))]


def _is_rating(value: object) -> bool:
    return type(value) is int and value in SCORES
