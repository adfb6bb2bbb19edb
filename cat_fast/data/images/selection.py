"""Selection of images from an index, with a line per image and ratio."""

from collections import Counter
from collections.abc import Mapping, Sequence
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
    repeats: Mapping[str, int] | None = None,
) -> list[ImageRecord]:
    """Return the records whose key matches a pattern of `keep` and none of `drop`, in order.

    Args:
        keep, drop: patterns of `fnmatch`.
        ratios: each record is repeated once per entry, with this ratio and a key that ends in it; empty keeps
            records as they are.
        optional_ending: ending of captions that every other record of an image omits.
        repeats: pattern -> number of records of each image whose key matches; the first match counts. Keys
            of further records end in .2, .3 and so on.

    Raises:
        UserError: no key matches `keep`, or a pattern of `repeats`.
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
    if repeats:
        chosen = _repeated(chosen, repeats)
    if not ratios:
        return chosen
    return [
        _without(optional_ending, copy) if number % 2 else copy
        for record in chosen
        for number, copy in enumerate(_at_ratios(record, ratios))
    ]


def parse_repeats(entries: Sequence[str]) -> dict[str, int]:
    """Return the number by pattern of entries such as "photographs/*=8".

    Raises:
        UserError: an entry has no pattern or no positive integer.
    """
    found = {}
    for entry in entries:
        pattern, _, number = entry.rpartition("=")
        if not pattern or not number.isdecimal() or int(number) == 0:
            raise UserError(f"repeat: expected PATTERN=N, such as 'photographs/*=8', got {entry!r}")
        found[pattern] = int(number)
    return found


def _repeated(records: Sequence[ImageRecord], repeats: Mapping[str, int]) -> list[ImageRecord]:
    for pattern in repeats:
        if not any(fnmatchcase(record.key, pattern) for record in records):
            raise UserError(f"repeat: none of the {len(records)} selected keys matches {pattern!r}")
    found = []
    for record in records:
        number = next((n for pattern, n in repeats.items() if fnmatchcase(record.key, pattern)), 1)
        found += [record, *(replace(record, key=f"{record.key}.{copy}") for copy in range(2, number + 1))]
    return found


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
