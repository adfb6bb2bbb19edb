"""Origin of scores and ratios, stored with them in indices, sidecars, shards of images and latents.

A score depends on its scorer, and a ratio on the thresholds applied to it. Both change over time, and data
sets are combined, so whatever stores scores or ratios also stores their origin.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

Pair = tuple[float, float]
"""Two thresholds: integers, or real numbers for expected scores."""


@dataclass(frozen=True)
class ScoredBy:
    """Scorer of a score, and the thresholds that belong to its scores."""

    scorer: str
    version: str
    thresholds: Pair

    @classmethod
    def of(cls, value: Any) -> "ScoredBy | None":
        """Return the scorer in the JSON field "scored_by"; None for null.

        Raises:
            ValueError: the value is not {"scorer": NAME, "version": TEXT, "thresholds": [A, B]}.
        """
        if value is None or isinstance(value, cls):
            return value
        try:
            scorer, version, (a, b) = value["scorer"], value["version"], value["thresholds"]
            if not all(isinstance(text, str) for text in (scorer, version)):
                raise TypeError
            return _scored_by(scorer, version, _number(a), _number(b))
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                'scored_by: expected {"scorer": NAME, "version": TEXT, "thresholds": [A, B]},'
                f" got {value!r}"
            ) from None

    def __str__(self) -> str:
        return f"{self.scorer} {self.version}"


@dataclass(frozen=True, kw_only=True)
class RatioOrigin:
    """Origin of a ratio: the label, score, pixels or JPEG size that decided, and by which thresholds."""

    source: str
    """One of "fixed", "ratio" (a label), "score", "caption", "pixels" and "jpeg size"."""
    scored_by: ScoredBy | None = None
    """Scorer of the score that decided; None if it is not recorded, or nothing was scored."""
    thresholds: Pair | None = None
    """Thresholds applied to the score. None for a ratio label, which `scored_by.thresholds` decided."""
    jpeg_thresholds: Pair | None = None
    """Thresholds in bytes, if the JPEG size decided."""


def origins_to_json(origins: Mapping[RatioOrigin, int]) -> list[dict[str, Any]]:
    """Return numbers of images per origin as JSON objects, without fields that are not set."""
    rows = []
    for origin, images in sorted(origins.items(), key=str):
        fields = {name: value for name, value in asdict(origin).items() if value is not None}
        rows.append(fields | {"images": images})
    return rows


def origins_from_json(rows: Iterable[Mapping[str, Any]]) -> Counter[RatioOrigin]:
    """Return the numbers of images per origin that `origins_to_json` wrote."""
    origins: Counter[RatioOrigin] = Counter()
    for row in rows:
        origin = RatioOrigin(
            source=row["source"],
            scored_by=ScoredBy.of(row.get("scored_by")),
            thresholds=as_pair(row.get("thresholds")),
            jpeg_thresholds=as_pair(row.get("jpeg_thresholds")),
        )
        origins[origin] += row["images"]
    return origins


def as_pair(values: Iterable[float] | None) -> Pair | None:
    """Return the two thresholds of a JSON list; None for null."""
    if values is None:
        return None
    a, b = values
    return _number(a), _number(b)


@lru_cache(maxsize=1024)
def _scored_by(scorer: str, version: str, a: float, b: float) -> ScoredBy:
    return ScoredBy(scorer, version, (a, b))  # one object for the rows of millions of images


def _number(value: Any) -> float:
    """Return an integer, also one that a table stores as a float, or another finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a number, got {value!r}")
    return int(value) if value % 1 == 0 else float(value)
