"""Selection of images from an index, with a line per image and ratio."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from cat_fast.data.images.index import ImageRecord
from cat_fast.errors import UserError


def parse_ratios(text: str) -> list[int]:
    """Return the ratios in a list such as "8,16,16,32".

    Raises:
        UserError: an entry is not a positive integer.
    """
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entry.isdecimal() and int(entry) > 0 for entry in entries):
        raise UserError(f"ratios: expected positive integers, such as 8,16,32, got {text!r}")
    return [int(entry) for entry in entries]


def select_records(
    records: Sequence[ImageRecord],
    *,
    keep: Sequence[str] = ("*",),
    drop: Sequence[str] = (),
    ratios: Sequence[int] = (),
    optional_ending: str = "",
    keep_classes: bool = True,
) -> list[ImageRecord]:
    """Return the records whose key matches a pattern of `keep` and none of `drop`, in order.

    Args:
        keep, drop: patterns of `fnmatch`.
        ratios: each record is repeated once per entry, with this ratio and a key that ends in it; empty keeps
            records as they are.
        optional_ending: ending of captions that every other record of an image omits.

    Raises:
        UserError: no key matches.
    """
    chosen = [
        record
        for record in records
        if any(fnmatchcase(record.key, pattern) for pattern in keep)
        and not any(fnmatchcase(record.key, pattern) for pattern in drop)
    ]
    if not chosen:
        example = f", such as {records[0].key!r}" if records else ""
        raise UserError(
            f"no key matches --keep {' '.join(keep)} without --drop {' '.join(drop) or '(none)'}; the index "
            f"has {len(records)} keys{example}"
        )
    if not keep_classes:
        chosen = [replace(record, category="") for record in chosen]
    if not ratios:
        return chosen
    return [
        _without(optional_ending, copy) if number % 2 else copy
        for record in chosen
        for number, copy in enumerate(_at_ratios(record, ratios))
    ]


def _at_ratios(record: ImageRecord, ratios: Sequence[int]) -> list[ImageRecord]:
    counts: Counter[int] = Counter()
    copies = []
    for ratio in ratios:
        counts[ratio] += 1
        number = f".{counts[ratio]}" if counts[ratio] > 1 else ""
        # the score no longer explains the ratio
        copies.append(
            replace(
                record,
                key=f"{record.key}@{ratio}x{number}",
                ratio=ratio,
                score=None,
                expected=None,
                scored_by=None,
            )
        )
    return copies


def _without(ending: str, record: ImageRecord) -> ImageRecord:
    return replace(record, caption=record.caption.removesuffix(ending)) if ending else record
